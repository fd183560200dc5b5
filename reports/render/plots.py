"""Plots as inline SVG that follow the page: its fonts, its colours in light and dark, no script.

matplotlib draws with sentinel colours that are then replaced by CSS variables; text stays text. Sides differ
by marker and name as well as by colour (Okabe-Ito hues). Output is deterministic.

Try: ``python -c "import pathlib, reports.record as r, reports.render.plots as p;
print(p.all_plots(r.read_record(pathlib.Path('reports/out/record.json')))[0].svg)"``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.record import Case, RunRecord, Side
from reports.render.words import bare_ms, fixed, ms, shorten
from reports.stats import Metric, median, samples
from reports.summary import (
    estimate,
    floor_rows,
    floor_s,
    gaps,
    headline_case,
    mean_context,
    measured_sides,
    ordered_sides,
)

WIDTH_IN = 4.5
LABEL_CHARS = 46
"""Characters of name and value together above one row."""
DOTS = 180
"""Dots drawn per side: an evenly spaced choice of the sorted samples, both ends kept."""

INK, MUTED, GRID = "#010201", "#010202", "#010203"
_SIDE_COLOURS = tuple(f"#0103{i:02x}" for i in range(6))
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(_SIDE_COLOURS)
}
_MARKERS = ("o", "s", "^", "D", "v", "P")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚")

_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.10g}")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llama-onnx-bench",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 10.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the page; ``description`` says in words what the picture shows."""

    key: str
    title: str
    svg: str
    description: str
    caption: str


@dataclass(frozen=True)
class SideStyle:
    """How one side is drawn colour index (CSS ``--s0`` ...), marker in plots, glyph in legends."""

    side: Side
    index: int

    @property
    def glyph(self) -> str:
        """The marker as a character."""
        return GLYPHS[self.index]

    @property
    def colour(self) -> str:
        """Sentinel that becomes a CSS variable."""
        return _SIDE_COLOURS[self.index]

    @property
    def marker(self) -> str:
        """The matplotlib marker."""
        return _MARKERS[self.index]


def side_styles(record: RunRecord) -> dict[str, SideStyle]:
    """A style per label. 0 is kept for the candidate, 1 for the baseline; peers take the rest in turn."""
    styles, peers = {}, 0
    for side in ordered_sides(record):
        index = {"candidate": 0, "baseline": 1}.get(side.role, 2 + peers % 4)
        peers += side.role == "peer"
        styles[side.label] = SideStyle(side, index)
    return styles


def all_plots(record: RunRecord) -> list[Plot]:
    """The figures that the record has the data for, in page order."""
    case = headline_case(record)
    found: list[Plot | None] = [context_plot(record)]
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
    found = [
        (side, values)
        for side in measured_sides(record, case)
        if (values := samples(record.find(case, side.label), metric))
    ]
    caption = "One mark per round; the bar is the median, the band the middle half."
    return _strip(record, f"{metric}-rounds", f"{name}, each round", found, case, caption)


def gaps_plot(record: RunRecord, case: Case) -> Plot | None:
    """Every gap between two tokens of every side on one case."""
    found = [(side, values) for side in measured_sides(record, case) if (values := gaps(record, case, side.label))]
    drawn = f"; at most {DOTS} marks a side, evenly chosen from the sorted gaps" if _thinned(found) else ""
    caption = f"One mark per gap between two tokens (ITL){drawn}; the bar is the median, the band the middle half."
    return _strip(record, "gaps", "Gap between tokens, all rounds", found, case, caption)


def context_plot(record: RunRecord) -> Plot | None:
    """TPOT against context, smallest batch, with the memory floor; needs two lengths of prompt."""
    batch = min((c.batch for c in record.cases()), default=1)
    cases = sorted((c for c in record.cases() if c.batch == batch), key=mean_context)
    lines = [
        (side, [(c, e) for c in cases if (e := estimate(record, c, side.label, "tpot"))])
        for side in ordered_sides(record)
    ]
    lines = [(side, points) for side, points in lines if points]
    if len({mean_context(c) for _, points in lines for c, _ in points}) < 2:
        return None
    styles = side_styles(record)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.9)
        for side, points in lines:
            style = styles[side.label]
            x, y = [mean_context(c) for c, _ in points], [e.value * 1e3 for _, e in points]
            low = [(e.value - (e.low if e.low is not None else e.value)) * 1e3 for _, e in points]
            high = [((e.high if e.high is not None else e.value) - e.value) * 1e3 for _, e in points]
            axes.errorbar(
                x, y, yerr=[low, high], color=style.colour, marker=style.marker, markersize=5.5, linewidth=1.6
            )
        floors = [(mean_context(c), f * 1e3) for c in cases if (f := floor_s(record, c))]
        if floors:
            axes.plot(*zip(*floors, strict=True), color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_THOUSANDS)
        axes.set_xlabel("context, tokens per row")
        axes.set_title("ms per token", loc="left", fontsize=10.5, color=MUTED)
        floor_words = " The dashed line is the memory floor." if floors else ""
        said = "; ".join(
            f"{side.title}: " + ", ".join(f"{ms(e.value)} at {mean_context(c):,.0f} tokens" for c, e in points)
            for side, points in lines
        )
        title = "Time per output token against context"
        caption = f"Batch {batch}; medians with their 95 % intervals.{floor_words}"
        return _plot("context", title, figure, f"{title}, batch {batch}. {said}.{floor_words}", caption)


def floor_plot(record: RunRecord, case: Case) -> Plot | None:
    """Bars of TPOT from the memory floor up, each with its multiple of the floor."""
    rows, floor = floor_rows(record, case), floor_s(record, case)
    if not rows or not floor:
        return None
    styles = side_styles(record)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.5 + 0.48 * (len(rows) + 1))
        bars = [("Memory floor", floor, "none", f"{bare_ms(floor)} ms")]
        for r in rows:
            label = f"{bare_ms(r.tpot.value)} ms, {fixed(r.multiple)}×"
            bars.append((r.side.title, r.tpot.value, styles[r.side.label].colour, label))
        for i, (title, value, colour, label) in enumerate(bars):
            edge = INK if colour == "none" else colour
            axes.barh(-i, value * 1e3, height=0.3, color=colour, edgecolor=edge, linewidth=1)
            axes.plot([floor * 1e3] * 2, [-i - 0.23, -i + 0.2], color=INK, linewidth=1.4, linestyle=(0, (2, 1.5)))
            _row_label(axes, -i + 0.2, title, label)
        axes.set_ylim(-len(bars) + 0.7, 0.62)
        _only_x(axes, "ms per token")
        title = "Distance to the memory floor"
        said = "; ".join(f"{t} {label}" for t, _, _, label in bars)
        caption = (
            f"{case.label[:1].upper()}{case.label[1:]}; × is the multiple of the floor, the time to read the "
            "candidate's weights and cache once. A side with fewer bytes may lie below it."
        )
        return _plot("floor", title, figure, f"{title}, {case.label}. {said}.", caption)


def _thinned(found: Sequence[tuple[Side, list[float]]]) -> bool:
    return any(len(values) > DOTS for _, values in found)


def _strip(
    record: RunRecord, key: str, title: str, found: list[tuple[Side, list[float]]], case: Case, caption: str
) -> Plot | None:
    """Dots of every side in a row of its own, on one axis from zero."""
    if not found:
        return None
    styles = side_styles(record)
    edge = 1.15 * max(_bulk_end(values) for _, values in found)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.5 + 0.62 * len(found))
        beyond = 0
        for i, (side, values) in enumerate(found):
            style = styles[side.label]
            chosen = choose(sorted(values))
            # Golden-ratio jitter: spread out, and the same on every run.
            heights = [-i + 0.3 * ((j * 0.618034) % 1 - 0.5) - 0.06 for j in range(len(chosen))]
            inside = [(v * 1e3, h) for v, h in zip(chosen, heights, strict=True) if v <= edge]
            outside = sum(1 for v in values if v > edge)
            beyond += outside
            q1, middle, q3 = (quantile(sorted(values), q) * 1e3 for q in (0.25, 0.5, 0.75))
            axes.fill_betweenx([-i - 0.27, -i + 0.15], q1, q3, color=style.colour, alpha=0.22, linewidth=0)
            if inside:
                axes.scatter(
                    [v for v, _ in inside],
                    [h for _, h in inside],
                    s=10,
                    marker=style.marker,
                    color=style.colour,
                    alpha=0.45,
                    linewidths=0,
                )
            axes.plot([middle, middle], [-i - 0.3, -i + 0.18], color=INK, linewidth=1.3, solid_capstyle="butt")
            more = f", {outside} beyond ▸" if outside else ""
            _row_label(axes, -i + 0.24, side.title, f"median {bare_ms(middle / 1e3)} ms{more}")
        axes.set_xlim(0, edge * 1e3)
        axes.set_ylim(-len(found) + 0.6, 0.62)
        _only_x(axes, "ms")
        said = "; ".join(
            f"{s.title} median {ms(median(v).value)}, {bare_ms(min(v))} to {ms(max(v))}, {len(v)} samples"
            for s, v in found
        )
        cut = " ▸ counts samples right of the axis." if beyond else ""
        return _plot(key, title, figure, f"{title}, {case.label}. {said}.", f"{caption}{cut}")


def _bulk_end(values: list[float]) -> float:
    """Where the axis may end: the largest sample, unless it lies far off and would squeeze all others."""
    return min(max(values), 2.5 * quantile(sorted(values), 0.5)) or 1e-9


def choose(ordered: list[float]) -> list[float]:
    """At most ``DOTS`` of sorted values, evenly chosen, both ends kept."""
    if len(ordered) <= DOTS:
        return ordered
    step = (len(ordered) - 1) / (DOTS - 1)
    return [ordered[round(i * step)] for i in range(DOTS)]


def quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between the two neighbours in sorted values."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure, figure.add_subplot()


def _row_label(axes: Axes, y: float, title: str, value: str) -> None:
    """Name at the left and value at the right above a row: no margin is lost to labels on a phone."""
    place = axes.get_yaxis_transform()
    axes.text(0, y, shorten(title, LABEL_CHARS - len(value)), transform=place, va="bottom", ha="left")
    axes.text(1, y, value, transform=place, va="bottom", ha="right", color=MUTED)


def _only_x(axes: Axes, label: str) -> None:
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.set_xlabel(label)


def _plot(key: str, title: str, figure: Figure, description: str, caption: str) -> Plot:
    return Plot(key, title, _svg(figure, key, title, description), description, caption)


def _svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element for inlining: no prolog, no size, ids of its own, page colours."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # A glyph that DejaVu lacks is drawn by the reader's own fonts, as text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    # Only inside tags: names in the text nodes are data, whatever they look like.
    text = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag.group(), key), text)
    head, body = text.split(">", 1)
    said = f'<title id="{key}-title">{escape(title)}</title>\n<desc id="{key}-desc">{escape(description)}</desc>'
    return f"{head}>\n{said}{body}".strip()


def _page_tag(tag: str, key: str) -> str:
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="([^"]*)"', tag)
        named = f'role="img" aria-labelledby="{key}-title {key}-desc"'
        return f'<svg viewBox="{box.group(1) if box else ""}" {named}>'
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r'\bxlink:href="#([^"]+)"', rf'href="#{key}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    for sentinel, variable in _VARIABLES.items():
        tag = tag.replace(sentinel, variable)
    return tag
