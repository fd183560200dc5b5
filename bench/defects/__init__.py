"""Deliberate defects and harmless changes of an exported folder: what the gate must fail, and what it must let pass.

Try: ``python -m bench.defects --mode quick --precision fp32 --out docs/gate-catalogue.md``.
"""
