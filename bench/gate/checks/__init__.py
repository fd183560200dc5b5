"""The checks, one file a family; :mod:`bench.gate.registry` lists them."""
