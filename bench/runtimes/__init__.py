"""Other ONNX Runtimes than this environment's: made by version, and a folder opened under one of them."""

LIMIT_S = 900.0
"""The most seconds that one call under another one may take, unless it is said."""
