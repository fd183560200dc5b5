"""The project's own targets: how fast the fused export has to be."""

FLOOR_LIMIT = 1.35
"""A decode step may take so many times what reading its bytes once takes."""
