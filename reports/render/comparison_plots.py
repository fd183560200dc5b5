"""The plots of a comparison: forest plot, pairs, distributions, machine trace, sparkline.

Every plot has a description in words. Statuses and sides differ by shape as well as by colour.

Try: ``python -c "import reports.render.comparison_plots as p; help(p.forest)"``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reports.comparison import CaseRecord, ChangeStatus, History, Result
from reports.comparison_summary import samples_by_side
from reports.render import comparison_words as cw
from reports.render import svg, words
from reports.render.svg import Axis, Plot, StripRow

PAIRS_HEIGHT = 190
_SIDES = {"candidate": ("circle", "k0"), "base": ("square", "k1")}
_DISPLAYED = {"s": ("ms", 1e3), "seconds": ("ms", 1e3), "B": ("MB", 1e-6), "bytes": ("MB", 1e-6)}
"""Unit of a result -> the unit of its axis and the factor between them."""
_FURTHEST = math.log(1.6)
"""The forest's axis never spans more than 60 % to either side; what lies beyond is drawn as an arrow at the edge."""


@dataclass(frozen=True)
class Forest:
    """A forest plot: results with their drawings (decoration: the numbers are beside them as text) on one axis.

    ``axis_svg`` carries the ticks, ``cut`` counts the results that are not shown.
    """

    rows: tuple[tuple[Result, str], ...]
    axis_svg: str
    cut: int


def forest(results: Sequence[Result], axis: Axis, cut: int = 0) -> Forest:
    """One row for every result, on one logarithmic axis of the ratio candidate / base."""
    return Forest(tuple((r, _forest_row(r, axis)) for r in results), _forest_ticks(axis), cut)


def forest_axis(results: Sequence[Result]) -> Axis:
    """Wide enough for all intervals and 1.7 margins to each side, up to 60 % of change."""
    ends = [math.log(x) for r in results for x in (r.low, r.high, r.ratio) if x and x > 0]
    margin = max((math.log1p(r.margin) for r in results), default=0.03)
    low = max(-_FURTHEST, min([-1.7 * margin, *(e * 1.06 for e in ends)]))
    high = min(_FURTHEST, max([1.7 * margin, *(e * 1.06 for e in ends)]))
    return Axis(low, high, 2.5)


def pairs_plot(result: Result) -> Plot | None:
    """The ratio of every pair in the order in which they were measured, with estimate, interval and margin."""
    drawn = [(i, p) for i, p in enumerate(result.pairs) if p.ratio]
    if not drawn:
        return None
    margin = math.log1p(result.margin)
    known = [math.log(p.ratio) for _, p in drawn if p.ratio] + [-margin * 1.2, margin * 1.2]
    known += [math.log(x) for x in (result.low, result.high) if x]
    axis = Axis.around(known)
    height = PAIRS_HEIGHT

    def y(log_ratio: float) -> float:
        return axis.rise(log_ratio, 10, height - 26)

    def x(i: int) -> float:
        return 14 + (i + 0.5) * 84 / max(len(result.pairs), 1)

    left = svg.LABELLED
    body = [svg.band(left, 100, y(margin), y(-margin) - y(margin), "margin")]
    for tick in svg.ticks(math.expm1(axis.low), math.expm1(axis.high), 6):
        body.append(svg.level(_tick(tick), y(math.log1p(tick)), "zero" if tick == 0 else "grid"))
    if result.low and result.high and result.ratio:
        low, high = math.log(result.low), math.log(result.high)
        body.append(svg.band(left, 100, y(high), y(low) - y(high), "interval"))
        body.append(svg.line(left, y(math.log(result.ratio)), 100, y(math.log(result.ratio)), "estimate"))
    for i, p in drawn:
        shape = "cross" if not p.valid else "square" if p.base_first is False else "circle"
        body.append(svg.mark(shape, x(i), y(math.log(p.ratio or 1)), "lost" if not p.valid else "k0"))
    body.append(svg.text("pair 1", x(0), height - 4, "middle", "t"))
    if len(result.pairs) > 1:
        last = len(result.pairs) - 1
        body.append(svg.text(f"{last + 1}", x(last), height - 4, "middle", "t"))
    valid = sum(p.valid for _, p in drawn)
    said = f"{valid} valid pairs of {len(result.pairs)}; estimate {cw.signed(result.ratio)}"
    interval = cw.signed_interval(result)
    said += f", 95 % interval {interval}" if interval else ""
    return Plot(
        "Each pair, candidate against base",
        svg.picture(height, "".join(body), f"Ratio of each pair in order. {said}."),
        _pairs_caption(result),
    )


def distribution(result: Result, records: Sequence[CaseRecord]) -> Plot | None:
    """Every raw sample of both sides in a row of its own, on one axis that need not begin at zero."""
    sides = samples_by_side(records, result.metric)
    if not sides:
        return None
    unit, scale = _DISPLAYED.get(result.unit, (result.unit, 1.0))
    every = [v * scale for values in sides.values() for v in values]
    axis = Axis.around([min(every), min(max(every), 1.6 * float(np.quantile(every, 0.9)))], 0.04)
    rows, said = [], []
    for side, values in sorted(sides.items()):
        middle = cw.value(statistics.median(values), result.unit)
        shape, klass = _SIDES[side]
        rows.append(StripRow(side, f"median {middle}, n {len(values)}", [v * scale for v in values], shape, klass))
        said.append(f"{side} median {middle}, {len(values)} samples")
    return svg.strip(
        "Distribution of all samples",
        rows,
        axis,
        words.shorten(unit, 16),
        f"Distribution: {'; '.join(said)}.",
        "One mark per round of every process that counts; the bar is the median, the band the middle half. "
        "The axis does not begin at zero.",
    )


def machine_trace(records: Sequence[CaseRecord]) -> Plot | None:
    """What the machine did while a case ran: clock, load, time taken by others, GPU clock and temperature."""
    ordered = sorted(
        (r for r in records if r.side is not None),
        key=lambda r: r.sequence if r.sequence is not None else 0,
    )
    panels = []
    for title, read, digits in _TRACES:
        values = [read(r) for r in ordered]
        if len([v for v in values if v is not None]) > 1:
            panels.append((title, values, digits))
    if not panels:
        return None
    body, said, row = [], [], 66
    for k, (title, values, digits) in enumerate(panels):
        known = [v for v in values if v is not None]
        low, high = min(known), max(known)
        # A flat line is drawn flat: a change below 2 % of the level is not blown up to the panel's height.
        air = max((high - low) * 0.1, abs(high) * 0.02, 1e-9)
        axis, bottom = Axis(low - air, high + air), (k + 1) * row - 12
        span = f"{low:,.{digits}f} to {high:,.{digits}f}" if low != high else f"{low:,.{digits}f} throughout"
        body += [svg.text(title, 0, k * row + 13), svg.text(span, 100, k * row + 13, "end", "t")]
        body.append(svg.line(0, bottom + 3, 100, bottom + 3, "grid"))
        places = [
            (2 + (i + 0.5) * 96 / len(values), axis.rise(v, k * row + 22, bottom), ordered[i])
            for i, v in enumerate(values)
            if v is not None
        ]
        body.append(svg.polyline([(px, py) for px, py, _ in places], "trace"))
        for px, py, r in places:
            if r.outcome != "ok":
                body.append(svg.mark("cross", px, py, "lost"))
            else:
                shape, klass = _SIDES[r.side or "base"]
                body.append(svg.mark(shape, px, py, klass, small=True))
        said.append(f"{title} {span}")
    return Plot(
        "The machine meanwhile",
        svg.picture(len(panels) * row, "".join(body), f"Machine state: {'; '.join(said)}."),
        f"{len(ordered)} processes in the order in which they ran. Circle: candidate, square: base, "
        "cross: does not count.",
    )


def sparkline(history: History) -> str:
    """A metric's past as a small line; a step is a dashed vertical line, the last point is marked."""
    values = [p.value for p in history.points]
    if not values:
        return ""
    axis = Axis.around(values)
    height = 40

    def y(v: float) -> float:
        return axis.rise(v, 5, height - 5)

    def x(i: float) -> float:
        return 2 + i * 96 / max(len(values) - 1, 1)

    body = [svg.line(x(s.index - 0.5), 2, x(s.index - 0.5), height - 2, "step") for s in history.steps]
    body.append(svg.polyline([(x(i), y(v)) for i, v in enumerate(values)], "trace"))
    body.append(svg.mark("circle", x(len(values) - 1), y(values[-1]), "k0"))
    first, last = (cw.value(v, history.unit) for v in (values[0], values[-1]))
    return svg.picture(height, "".join(body), f"{len(values)} runs, from {first} to {last}")


def _forest_row(r: Result, axis: Axis) -> str:
    """Places in per cent both ways: the row is as high as its text, and the bands of all rows meet."""
    margin, zero = math.log1p(r.margin), axis.place(0)
    width = axis.place(margin) - axis.place(-margin)
    body = [
        f'<rect x="{axis.place(-margin):.2f}%" width="{width:.2f}%" height="100%" class="margin"/>',
        f'<line x1="{zero:.2f}%" x2="{zero:.2f}%" y2="100%" class="zero"/>',
    ]
    klass = f"st-{r.status.lower()}"
    if r.low and r.high and r.low > 0:
        ends = [(axis.place(e), axis.holds(e)) for e in (math.log(r.low), math.log(r.high))]
        body.append(f'<line x1="{ends[0][0]:.2f}%" x2="{ends[1][0]:.2f}%" y1="50%" y2="50%" class="ci {klass}"/>')
        for (place, inside), arrow in zip(ends, ("left", "right"), strict=True):
            body.append(_at_middle("cap" if inside else arrow, place, f"edge {klass}"))
    if r.ratio and r.ratio > 0:
        if axis.holds(math.log(r.ratio)):
            body.append(_at_middle(cw.LOOKS[r.status].shape, axis.place(math.log(r.ratio)), klass))
    else:
        body.append(
            f'<text x="{zero:.2f}%" y="50%" dy="4" text-anchor="middle" class="t">{_empty_word(r.status)}</text>'
        )
    return f'<svg class="p" width="100%" height="100%" aria-hidden="true">{"".join(body)}</svg>'


def _at_middle(shape: str, x: float, klass: str) -> str:
    return f'<g class="m {shape} {klass}"><use href="#mark-{shape}" x="{x:.2f}%" y="50%"/></g>'


def _empty_word(status: ChangeStatus) -> str:
    return {"NEW": "no base", "MISSING": "no candidate", "INVALID": "disturbed"}.get(status, "not measured")


def _forest_ticks(axis: Axis) -> str:
    body = []
    for tick in svg.ticks(math.expm1(axis.low), math.expm1(axis.high), 6):
        place = axis.place(math.log1p(tick))
        body.append(svg.line(place, 0, place, 4, "tick"))
        if 4 < place < 96:
            body.append(svg.text(_tick(tick), place, 18, "middle", "t"))
    return svg.picture(22, "".join(body))


def _tick(fraction: float) -> str:
    if fraction == 0:
        return "0"
    return f"{'+' if fraction > 0 else '−'}{abs(fraction) * 100:.3g}\u00a0%"


def _pairs_caption(result: Result) -> str:
    shapes = {p.base_first for p in result.pairs if p.valid and p.ratio}
    told = "Circle: base ran first; square: candidate first." if len(shapes - {None}) == 2 else "One mark per pair."
    lost = sum(not p.valid for p in result.pairs)
    more = f" Cross: {lost} that do{'es' * (lost == 1)} not count." if lost else ""
    return (
        f"{told}{more} The line is the estimate, the band around it its 95\u00a0% interval, the grey band the margin "
        f"of {result.margin * 100:g}\u00a0%. Above 0 the candidate is {cw.direction(2, result.unit)}."
    )


def _taken(r: CaseRecord) -> float | None:
    shares = [s for s in (r.steal_fraction, r.others_fraction) if s is not None]
    return 100 * sum(shares) if shares else None


_TRACES: tuple[tuple[str, Callable[[CaseRecord], float | None], int], ...] = (
    ("CPU clock after, MHz", lambda r: r.after.cpu_mhz if r.after else None, 0),
    ("Load before, 1 min", lambda r: r.before.load_1m if r.before else None, 2),
    ("Taken by others, % of all cores", _taken, 1),
    ("GPU clock after, MHz", lambda r: r.after.gpus[0].sm_clock_mhz if r.after and r.after.gpus else None, 0),
    ("GPU temperature after, °C", lambda r: r.after.gpus[0].temperature_c if r.after and r.after.gpus else None, 0),
)
