"""Small SVG by hand for the plots of both pages: no script, colours and text of the page, the width of its box.

A plotting library takes some 60 ms a plot; a comparison of a few hundred results has to be drawn in a second.
Horizontal places are percentages, so that text and marks keep their size on a phone and on paper.

Try: ``python -c "from reports.render.svg import Axis; print(Axis.around([0.97, 1.05]).ticks)"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from reports.render.words import shorten

LEFT, RIGHT = 2.0, 98.0
"""Percentages between which data are drawn, so that a mark at the end is not cut."""

LABELLED = 12.0
"""Percentage from which data are drawn where a vertical axis has its labels at the left."""

LABEL_CHARS = 44
"""Characters of name and value together above one row: they share the width of a phone."""

DOTS = 180
"""Dots drawn per row: an evenly spaced choice of the sorted samples, both ends kept."""

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "ring": "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0Z",
    "square": "M-4 -4h8v8h-8Z",
    "right": "M-4.5 -5.5L6 0L-4.5 5.5Z",
    "left": "M4.5 -5.5L-6 0L4.5 5.5Z",
    "cross": "M-4 -4L4 4M-4 4L4 -4",
    "up": "M-5 4L0 -5L5 4Z",
    "down": "M-5 -4L0 5L5 -4Z",
    "diamond": "M-5 0L0 -5L5 0L0 5Z",
    "plus": "M-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3Z",
    "cap": "M-1 -4h2v8h-2Z",
}


@dataclass(frozen=True)
class Plot:
    """One plot of a page: a title, the drawing and what it shows, in words."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class StripRow:
    """One row of a strip of dots: its name, the text at its right, its samples and how they are drawn."""

    name: str
    told: str
    values: Sequence[float]
    shape: str
    klass: str


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high`` whose places are per cent of the width (``LEFT`` to ``RIGHT``)."""

    low: float
    high: float
    left: float = LEFT

    @staticmethod
    def around(values: Iterable[float], pad: float = 0.06) -> Axis:
        """An axis that holds all finite values with some air at both ends."""
        found = [v for v in values if math.isfinite(v)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        air = (high - low) * pad or abs(high) * 0.05 or 1.0
        return Axis(low - air, high + air)

    def place(self, value: float) -> float:
        """Per cent of the width; values beyond an end are drawn at that end."""
        share = (value - self.low) / (self.high - self.low)
        return self.left + min(max(share, 0.0), 1.0) * (RIGHT - self.left)

    def rise(self, value: float, top: float, bottom: float) -> float:
        """Pixels from the top of the plot, where this axis is vertical between ``top`` and ``bottom``."""
        share = (value - self.low) / (self.high - self.low)
        return bottom - min(max(share, 0.0), 1.0) * (bottom - top)

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


def mark(shape: str, x: float, y: float, klass: str, small: bool = False) -> str:
    """A mark of fixed size at a place (per cent, pixels); the page holds its shape once, see ``shapes``."""
    return marks(shape, [(x, y)], klass, small)


def marks(shape: str, places: Iterable[tuple[float, float]], klass: str, small: bool = False) -> str:
    """Several marks of one look; ``small`` ones are half-transparent, for places where many lie on each other."""
    size = "-small" if small else ""
    used = "".join(f'<use href="#mark-{shape}{size}" x="{x:.2f}%" y="{y:.1f}"/>' for x, y in places)
    return f'<g class="m {shape}{" small" if small else ""} {klass}">{used}</g>' if used else ""


def shapes() -> str:
    """The shapes that marks refer to: once a page, before the first of them."""
    paths = "".join(
        f'<path id="mark-{name}" d="{path}"/><path id="mark-{name}-small" d="{path}" transform="scale(.6)"/>'
        for name, path in _MARKS.items()
    )
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


def across(axis: Axis, top: float, bottom: float, label: str) -> str:
    """The ticks of a horizontal axis as lines from ``top`` to ``bottom``, their values and the label below (34 px)."""
    body = []
    for tick in axis.ticks:
        place = axis.place(tick)
        anchor = "start" if place < 4 and tick else "end" if place > 96 else "middle"
        body += [line(place, top, place, bottom, "grid"), text(f"{tick:,.10g}", place, bottom + 15, anchor, "t")]
    middle = (axis.left + RIGHT) / 2
    return "".join([*body, text(label, middle, bottom + 31, "middle", "t")])


def level(label: str, y: float, klass: str = "grid") -> str:
    """A line of a vertical axis with its value at the left."""
    return line(LABELLED, y, 100, y, klass) + text(label, 0, y + 4, klass="t")


def row_label(name: str, told: str, y: float) -> str:
    """Name at the left and value at the right above a row: no margin is lost to labels on a phone."""
    return text(shorten(name, LABEL_CHARS - len(told)), 0, y) + text(told, 100, y, "end", "t")


def strip(title: str, rows: Sequence[StripRow], axis: Axis, unit: str, description: str, caption: str) -> Plot:
    """Dots of every row on one axis, with median and middle half; what lies right of the axis is counted."""
    body = [across(axis, 2, 8 + 62 * len(rows), unit)]
    cut = ""
    for i, row in enumerate(rows):
        top, ordered = 4 + 62 * i, sorted(row.values)
        low, middle, high = (axis.place(float(q)) for q in np.quantile(ordered, (0.25, 0.5, 0.75)))
        outside = sum(v > axis.high for v in ordered)
        cut = " ▸ counts samples right of the axis." if outside else cut
        # Golden-ratio jitter: spread out, and the same on every run.
        places = [
            (axis.place(v), top + 38 + 26 * ((j * 0.618034) % 1 - 0.5))
            for j, v in enumerate(choose(ordered))
            if v <= axis.high
        ]
        body += [
            row_label(row.name, f"{row.told}, {outside} beyond ▸" if outside else row.told, top + 13),
            band(low, high, top + 21, 34, f"quart {row.klass}"),
            marks(row.shape, places, row.klass, small=True),
            line(middle, top + 19, middle, top + 57, "median"),
        ]
    return Plot(title, picture(46 + 62 * len(rows), "".join(body), description), caption + cut)


def choose(ordered: Sequence[float]) -> list[float]:
    """At most ``DOTS`` of sorted values, evenly chosen, both ends kept."""
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(len(ordered), DOTS)).tolist()]
