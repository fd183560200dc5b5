"""Numbers as arguments: a type for argparse that refuses what makes no sense before anything is loaded.

Try: ``llama-onnx perplexity FOLDER --window 0``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: int | float) -> Callable[[str], int | float]:
    """A whole number (where ``least`` is one), or a finite one, from ``least`` on."""

    def read(text: str) -> int | float:
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {_KINDS[type(least)]} of {least:g} or more")
        return value

    return read


_KINDS = {int: "whole number", float: "number"}
