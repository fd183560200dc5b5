"""Renderers of a record; each module imports its own heavy dependency, this one imports nothing."""
