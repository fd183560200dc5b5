"""Benchmark suites, workloads, parity checks, the gate and the command line.

The only package that sees ``export``, ``runtime`` and ``reports``. Try: ``pytest bench/ --profile smoke``.
"""

import export  # noqa: F401 - switches telemetry off before a library that reports is loaded
