"""Benchmark suites, workloads, parity checks, the gate and the command line.

The only package that sees ``export``, ``runtime`` and ``reports``. Try: ``pytest bench/ --profile smoke``.
"""
