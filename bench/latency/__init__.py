"""Is it as fast? Workloads, interleaved rounds, paired runs of two sides, sweeps."""
