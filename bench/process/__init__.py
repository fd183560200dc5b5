"""Child processes, workers and machines."""
