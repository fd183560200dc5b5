"""This machine: its environment, its state while something is measured, its lock."""
