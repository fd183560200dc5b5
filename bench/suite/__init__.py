"""One run of ``pytest bench/``: what is under test, what is measured, its record."""
