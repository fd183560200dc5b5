"""Small SVG by hand for pages with hundreds of plots: no script, colours and text of the page, the width of its box.

matplotlib (``reports.render.plots``) takes some 60 ms a figure; a comparison of a few hundred results has to be drawn
in a second. Horizontal places are percentages, so that text and marks keep their size on a phone and on paper.

Try: ``python -c "from reports.render.svg import Axis; print(Axis.around([0.97, 1.05]).ticks)"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LEFT, RIGHT = 1.5, 98.5
"""Percentages between which data are drawn, so that a mark at the end is not cut."""

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "ring": "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0Z",
    "square": "M-4 -4h8v8h-8Z",
    "right": "M-4.5 -5.5L6 0L-4.5 5.5Z",
    "left": "M4.5 -5.5L-6 0L4.5 5.5Z",
    "cross": "M-4 -4L4 4M-4 4L4 -4",
    "cap": "M-1 -4h2v8h-2Z",
    "dot": "M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0Z",
    "block": "M-2.4 -2.4h4.8v4.8h-4.8Z",
}


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high`` whose places are per cent of the width (``LEFT`` to ``RIGHT``)."""

    low: float
    high: float
    left: float = LEFT

    @staticmethod
    def around(values: Iterable[float], pad: float = 0.06, left: float = LEFT) -> Axis:
        """An axis that holds all finite values with some air at both ends."""
        found = [v for v in values if math.isfinite(v)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        air = (high - low) * pad or abs(high) * 0.05 or 1.0
        return Axis(low - air, high + air, left)

    def place(self, value: float) -> float:
        """Per cent of the width; values beyond an end are drawn at that end."""
        share = (value - self.low) / (self.high - self.low)
        return self.left + min(max(share, 0.0), 1.0) * (RIGHT - self.left)

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high

    @property
    def ticks(self) -> list[float]:
        """Three to six round values between the ends."""
        return ticks(self.low, self.high)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between ``low`` and ``high``, at most about ``most``."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / most
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in _STEPS if s * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line(x1: float, y1: float, x2: float, y2: float, klass: str) -> str:
    """A line; x in per cent, y in pixels."""
    return f'<line x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}" class="{klass}"/>'


def band(x1: float, x2: float, y: float, height: float, klass: str) -> str:
    """A filled box; x in per cent, y and height in pixels."""
    return f'<rect x="{x1:.2f}%" y="{y:.1f}" width="{max(x2 - x1, 0):.2f}%" height="{height:.1f}" class="{klass}"/>'


def mark(shape: str, x: float, y: float, klass: str) -> str:
    """A mark of fixed size at a place (per cent, pixels); the page holds its shape once, see ``shapes``."""
    return marks(shape, [(x, y)], klass)


def marks(shape: str, places: Iterable[tuple[float, float]], klass: str) -> str:
    """Several marks of one look."""
    used = "".join(f'<use href="#mark-{shape}" x="{x:.2f}%" y="{y:.1f}"/>' for x, y in places)
    return f'<g class="m {shape} {klass}">{used}</g>' if used else ""


def shapes() -> str:
    """The shapes that marks refer to: once a page, before the first of them."""
    paths = "".join(f'<path id="mark-{name}" d="{path}"/>' for name, path in _MARKS.items())
    return f'<svg width="0" height="0" class="shapes" aria-hidden="true"><defs>{paths}</defs></svg>'


def text(content: str, x: float, y: float, anchor: str = "start", klass: str = "") -> str:
    """Text as text, escaped."""
    named = f' class="{klass}"' if klass else ""
    return f'<text x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(content)}</text>'


def polyline(places: Sequence[tuple[float, float]], klass: str) -> str:
    """A line through places, as segments: SVG takes no percentages in the points of a polyline."""
    return "".join(line(x1, y1, x2, y2, klass) for (x1, y1), (x2, y2) in pairwise(places))


def picture(height: float, body: str, description: str = "") -> str:
    """An inline ``<svg>`` as wide as its box and ``height`` pixels high; without a description it is decoration."""
    named = f'role="img" aria-label="{escape(description)}"' if description else 'aria-hidden="true"'
    return f'<svg class="p" width="100%" height="{height:.0f}" {named}>{body}</svg>'
