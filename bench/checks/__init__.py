"""The named checks of ``llama-onnx validate``; see :mod:`bench.checks.registry` for the list."""
