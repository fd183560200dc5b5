"""What can go wrong around a benchmark. Each error names the thing and the remedy."""

from __future__ import annotations


class BenchError(Exception):
    """Base of the benchmark's errors; ``exit_code`` is what the command line returns."""

    exit_code = 2


class DatasetError(BenchError):
    """A dataset that is missing, empty or malformed (the line is named)."""
