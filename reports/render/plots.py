"""The plots of a run's page: prefill by prompt length, rounds, gaps, TPOT by context, distance to the memory floor.

Every plot has a description in words. Sides differ by marker and name as well as by colour (Okabe-Ito hues).

Try: ``python -c "import pathlib, reports.record as r, reports.render.plots as p;
print(p.all_plots(r.RunRecord.read(pathlib.Path('reports/out/record.json')))[0].svg)"``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from reports.record import Case, RunRecord, Side
from reports.render import svg
from reports.render.svg import DOTS, Axis, Plot, StripRow
from reports.render.words import bare_ms, fixed, ms, times
from reports.stats import Estimate, Metric, samples
from reports.summary import (
    estimate,
    floor_rows,
    floor_s,
    gaps,
    headline_case,
    measured_sides,
    ordered_sides,
    prefill_cases,
    prefill_limit,
    prefill_rows,
    smallest_batch,
)

SHAPES = ("circle", "square", "up", "diamond", "down", "plus")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚")
_CURVES_BOTTOM = 220
_Line = tuple[Side, list[tuple[float, Estimate]]]
"""One side's values by place on the horizontal axis."""
_STRIP = "the bar is the median, the band the middle half."


@dataclass(frozen=True)
class SideStyle:
    """How one side is drawn: colour index (CSS ``--s0`` ...), marker in plots, glyph in legends."""

    side: Side
    index: int
    shape: str
    glyph: str

    @property
    def klass(self) -> str:
        """CSS class of the colour."""
        return f"k{self.index}"


def side_styles(record: RunRecord) -> dict[str, SideStyle]:
    """A style per label. 0 is kept for the candidate, 1 for the baseline; peers take the rest in turn."""
    styles, peers = {}, 0
    for side in ordered_sides(record):
        index = {"candidate": 0, "baseline": 1}.get(side.role, 2 + peers % 4)
        peers += side.role == "peer"
        styles[side.label] = SideStyle(side, index, SHAPES[index], GLYPHS[index])
    return styles


def all_plots(record: RunRecord) -> list[Plot]:
    """The plots that the record has the data for, in page order."""
    case = headline_case(record)
    found: list[Plot | None] = [prefill_plot(record), context_plot(record)]
    if case is not None:
        found += [
            floor_plot(record, case),
            rounds_plot(record, case, "ttft"),
            rounds_plot(record, case, "tpot"),
            gaps_plot(record, case),
            rounds_plot(record, case, "total"),
        ]
    return [p for p in found if p is not None]


def rounds_plot(record: RunRecord, case: Case, metric: Metric) -> Plot | None:
    """Every round of every side on one case."""
    name = {"ttft": "Time to first token", "tpot": "Time per output token", "total": "End to end"}[metric]
    found = [(s, samples(record.find(case, s.label), metric)) for s in measured_sides(record, case)]
    return _strip(record, f"{name}, each round", found, case, f"One mark per round; {_STRIP}")


def gaps_plot(record: RunRecord, case: Case) -> Plot | None:
    """Every gap between two tokens of every side on one case."""
    found = [(s, gaps(record, case, s.label)) for s in measured_sides(record, case)]
    thinned = any(len(values) > DOTS for _, values in found)
    drawn = f"; at most {DOTS} marks a side, evenly chosen from the sorted gaps" if thinned else ""
    caption = f"One mark per gap between two tokens (ITL){drawn}; {_STRIP}"
    return _strip(record, "Gap between tokens, all rounds", found, case, caption)


def context_plot(record: RunRecord) -> Plot | None:
    """TPOT against context, smallest batch, with the memory floor; needs two lengths of prompt."""
    batch = smallest_batch(record)
    cases = sorted((c for c in record.cases() if c.batch == batch), key=lambda c: c.mean_context)
    lines = [
        (side, [(c.mean_context, e) for c in cases if (e := estimate(record, c, side.label, "tpot"))])
        for side in ordered_sides(record)
    ]
    lines = [(side, points) for side, points in lines if points]
    contexts = {context for _, points in lines for context, _ in points}
    if len(contexts) < 2:
        return None
    floors = [(c.mean_context, f) for c in cases if (f := floor_s(record, c))]
    most = max(e.high or e.value for _, points in lines for _, e in points)
    body = _curves(record, "ms per token", "context, tokens per row", 1e3, most, lines, floors)
    floor_words = " The dashed line is the memory floor." if floors else ""
    said = "; ".join(
        f"{side.title}: " + ", ".join(f"{ms(e.value)} at {context:,.0f} tokens" for context, e in points)
        for side, points in lines
    )
    title = "Time per output token against context"
    return Plot(
        title,
        svg.picture(_CURVES_BOTTOM + 38, body, f"{title}, batch {batch}. {said}.{floor_words}"),
        f"Batch {batch}; medians with their 95\u00a0% intervals.{floor_words}",
    )


def prefill_plot(record: RunRecord) -> Plot | None:
    """Prompt tokens per second against prompt length, with the matrix-product floor; needs two lengths of prompt."""
    cases = prefill_cases(record)
    lines: list[_Line] = []
    for side, cells in prefill_rows(record):
        lines.append((side, [(c.prompt, e.tokens_per_s) for c, e in zip(cases, cells, strict=True) if e]))
    if len({prompt for _, points in lines for prompt, _ in points}) < 2:
        return None
    limits: list[tuple[float, float]] = [(c.prompt, limit) for c in cases if (limit := prefill_limit(record, c))]
    most = max([*(e.high or e.value for _, points in lines for _, e in points), *(limit for _, limit in limits)])
    body = _curves(record, "prompt tokens per second", "prompt, tokens", 1, most, lines, limits)
    told: list[tuple[str, list[tuple[float, float]]]]
    told = [(side.title, [(prompt, e.value) for prompt, e in points]) for side, points in lines]
    told += [("Matrix-product floor", limits)] if limits else []
    said = "; ".join(
        f"{name}: " + ", ".join(f"{fixed(value)} at {prompt:,.0f} tokens" for prompt, value in points)
        for name, points in told
    )
    title = f"Prefill tokens per second by prompt length, batch {cases[0].batch}"
    floor_words = " The dashed line is the matrix-product floor." if limits else ""
    return Plot(
        "Prefill tokens per second by prompt length",
        svg.picture(_CURVES_BOTTOM + 38, body, f"{title}. {said}.{floor_words}"),
        f"Batch {cases[0].batch}; tokens of the prompt over the median TTFT, with 95\u00a0% intervals; higher is "
        f"faster.{floor_words}",
    )


def _curves(
    record: RunRecord,
    unit: str,
    label: str,
    scale: float,
    most: float,
    lines: Sequence[_Line],
    floor: Sequence[tuple[float, float]],
) -> str:
    """A line a side with its intervals, and the floor dashed, over axes from zero.

    Args:
        record: whose sides' styles are taken.
        unit, label: of the vertical and the horizontal axis.
        scale: what values are multiplied by to be in that unit.
        most: the highest value.
        lines, floor: places on the horizontal axis and values.
    """
    styles = side_styles(record)
    top, bottom = 28, _CURVES_BOTTOM
    across = Axis(0, max(x for _, points in lines for x, _ in points) * 1.02, svg.LABELLED)
    up = Axis(0, 1.04 * scale * most)
    body = [svg.text(unit, 0, 12, klass="t"), svg.across(across, bottom, bottom + 3, label)]
    body += [svg.level(f"{tick:,.10g}", up.rise(tick, top, bottom)) for tick in up.ticks]
    body.append(svg.polyline([(across.place(x), up.rise(f * scale, top, bottom)) for x, f in floor], "floor"))
    for side, points in lines:
        style = styles[side.label]
        places = [(across.place(x), up.rise(e.value * scale, top, bottom)) for x, e in points]
        body.append(svg.polyline(places, f"side {style.klass}"))
        for (x, _), (_, e) in zip(places, points, strict=True):
            if e.low is not None and e.high is not None:
                ends = (up.rise(end * scale, top, bottom) for end in (e.low, e.high))
                body.append(svg.line(x, next(ends), x, next(ends), f"side {style.klass}"))
        body.append(svg.marks(style.shape, places, style.klass))
    return "".join(body)


def floor_plot(record: RunRecord, case: Case) -> Plot | None:
    """Bars of TPOT from the memory floor up, each with its multiple of the floor."""
    rows, floor = floor_rows(record, case), floor_s(record, case)
    if not rows or not floor:
        return None
    styles = side_styles(record)
    bars = [("Memory floor", floor, "least", ms(floor))]
    bars += [
        (r.side.title, r.tpot.value, f"bar {styles[r.side.label].klass}", f"{ms(r.tpot.value)}, {times(r.multiple)}")
        for r in rows
    ]
    axis = Axis(0, 1.04e3 * max(value for _, value, _, _ in bars))
    bottom, mark = 8 + 46 * len(bars), axis.place(floor * 1e3)
    body = [svg.across(axis, 2, bottom, "ms per token")]
    for i, (name, value, klass, told) in enumerate(bars):
        top = 4 + 46 * i
        body += [
            svg.row_label(name, told, top + 13),
            svg.band(axis.place(0), axis.place(value * 1e3), top + 21, 16, klass),
            svg.line(mark, top + 18, mark, top + 40, "floor"),
        ]
    title = "Distance to the memory floor"
    said = "; ".join(f"{name} {told}" for name, _, _, told in bars)
    return Plot(
        title,
        svg.picture(bottom + 38, "".join(body), f"{title}, {case.label}. {said}."),
        f"{case.label[:1].upper()}{case.label[1:]}; × is the multiple of the floor, the time to read the "
        "candidate's weights and cache once, round by round. A side with fewer bytes may lie below it.",
    )


def _strip(
    record: RunRecord, title: str, found: list[tuple[Side, list[float]]], case: Case, caption: str
) -> Plot | None:
    """Samples in seconds, a row a side, on one axis from zero that a few stray ones do not squeeze."""
    rows, said, ends, styles = [], [], [], side_styles(record)
    for side, values in found:
        if values:
            style, middle = styles[side.label], statistics.median(values)
            ends.append(min(max(values), 2.5 * middle) or 1e-9)
            rows.append(
                StripRow(side.title, f"median {ms(middle)}", [v * 1e3 for v in values], style.shape, style.klass)
            )
            said.append(
                f"{side.title} median {ms(middle)}, {bare_ms(min(values))} to {ms(max(values))}, {len(values)} samples"
            )
    if not rows:
        return None
    axis = Axis(0, 1.15e3 * max(ends))
    return svg.strip(title, rows, axis, "ms", f"{title}, {case.label}. {'; '.join(said)}.", caption)
