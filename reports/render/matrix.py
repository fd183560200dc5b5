"""A matrix as a page, as Markdown for a pull request and as JUnit.

Everything from the document is data: jinja2 escapes it, and a link leads to a file beside the page or is no link.
Try: ``llama-onnx report matrix.json --out /tmp/page``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from reports.matrix import OUTCOMES, Matrix, MatrixRow
from reports.render import comparison_plots as plots
from reports.render import comparison_words as cw
from reports.render import matrix_words as mw
from reports.render import words
from reports.render.environment import by_name, render
from reports.render.junit import add, case_of, document, told
from reports.render.markdown import LIMIT, SIGNS, bullets, escape, listed, repeat, table, within
from reports.verdict import WORDS

SOURCE = "matrix.json"
OPERATORS_SHOWN, WARNINGS_SHOWN, WARNING_CHARS = 40, 40, 600
_FILTERS = (
    *(cw.value, cw.tidy, cw.signed, cw.signed_interval, cw.ratio_text, cw.ratio_interval, cw.metric_name),
    *(mw.parity_cell, mw.load_text, mw.peak_text, mw.speed_of, mw.row_reasons),
    *(mw.difference_line, mw.link, mw.sentence, mw.warned, mw.operator_cells, mw.failed_first),
)


@dataclass(frozen=True)
class RowView:
    """A row with the id of its section; ``wrong``: another model, so that no speed-up of it counts."""

    row: MatrixRow
    index: int
    name: str

    @property
    def wrong(self) -> bool:
        """Whether it is another model."""
        return mw.state(self.row) == "different"

    @property
    def opened(self) -> bool:
        """Whether its section is open from the start."""
        return self.row.verdict == "FAIL"


def render_matrix(matrix: Matrix) -> str:
    """The whole page; equal documents give equal bytes."""
    overview = mw.Overview(matrix)
    filters = by_name(_FILTERS) | {
        "named_value": lambda row, name: mw.value_text(mw.measured(row, name)),
        "limit_of": lambda row, name: "" if (m := mw.measured(row, name)) is None or m.limit is None
        else words.limit_text(m.limit, m.better),
        "tone_in": lambda status, wrong: "fail" if wrong and status == "IMPROVED" else cw.LOOKS[status].tone,
        "glyph": lambda status: cw.LOOKS[status].glyph,
        "plain_value": words.plain,
    }  # fmt: skip
    return render("matrix.html.j2", matrix, _context(overview) | {"source": SOURCE}, filters)


def _context(overview: mw.Overview) -> dict[str, Any]:
    m = overview.matrix
    views = [RowView(row, i, overview.short(row)) for i, row in enumerate(m.rows, 1)]
    forests = _forests(views, overview)
    same = overview.states.get("same", [])
    neighbours = overview.neighbours(m.bisection) if m.bisection else []
    return {
        "m": m,
        "overview": overview,
        "word": WORDS[m.verdict.outcome],
        "sections": [
            ("runtimes", "Runtimes"),
            *([("speed", "Speed")] if forests else []),
            *([("bisection", "Bisection")] if m.bisection else []),
            *([("rows", "Row by row")] if views else []),
            ("reproduce", "Reproduce"),
            ("glossary", "Glossary"),
        ],
        "counts": [(v, n) for v in ("PASS", "FAIL", "INCONCLUSIVE") if (n := Counter(r.verdict for r in m.rows)[v])],
        "same": same,
        "views": views,
        "forests": forests,
        "several": len({r.case for v in views for r in v.row.speed}) > 1,
        "answers": [(cw.metric_title(x), overview.leading(x)) for x in mw.SPEED],
        "parity_heads": mw.PARITY,
        "speed_heads": [(x, cw.metric_name(x).capitalize()) for x in mw.SPEED],
        "neighbours": [v for n in neighbours for v in views if v.row is n],
        "bisection_line": mw.bisection_line(m.bisection) if m.bisection else "",
        "outcomes": OUTCOMES,
        "operators_shown": OPERATORS_SHOWN,
        "warnings_shown": WARNINGS_SHOWN,
        "warning_chars": WARNING_CHARS,
        "facts": _facts(m),
        "glossary": mw.GLOSSARY,
    }


def _forests(views: list[RowView], overview: mw.Overview) -> list[tuple[str, list[tuple[RowView, Any, str]], str]]:
    """Title, rows and axis of a forest plot a metric and case; one axis for all."""
    found = []
    every = overview.in_order([r for v in views for r in v.row.speed if r.metric in mw.SPEED])
    axis = plots.forest_axis(every)
    for metric in mw.SPEED:
        for case in dict.fromkeys(r.case for r in every if r.metric == metric):
            own = [(v, r) for v in views for r in v.row.speed if (r.metric, r.case) == (metric, case)]
            drawn = plots.forest([r for _, r in own], axis)
            rows = [(v, r, picture) for (v, _), (r, picture) in zip(own, drawn.rows, strict=True)]
            found.append((f"{cw.metric_title(metric)}, {words.shorten(case, 60)}", rows, drawn.axis_svg))
    return found


def _facts(m: Matrix) -> list[tuple[str, list[tuple[str, str]]]]:
    gate = [
        ("Folder", m.folder),
        ("Folder SHA-256", m.folder_sha256 or words.DASH),
        ("Oldest runtime allowed", m.oldest_runtime or "none named in the manifest"),
        ("Baseline", m.baseline),
        ("Baseline SHA-256", m.baseline_sha256 or words.DASH),
        ("Data", m.dataset),
        ("Tolerance tier", m.tier),
        ("Mode", m.mode),
    ]
    run = [
        ("Reference", m.reference),
        ("Cases", ", ".join(m.cases) or words.DASH),
        ("Pairs a case", str(m.pairs) if m.pairs else "speed not measured"),
        ("Started", words.when(m.created_utc)),
        ("Took", words.duration(m.duration_s)),
        ("Seed", str(m.seed)),
    ]
    versions = list({"llama-onnx-bench": m.tool_version, **m.versions}.items())
    return [("Gate", gate), ("Run", run), ("Machine", words.machine_facts(m.machine)), ("Versions", versions)]


# -- Markdown ---------------------------------------------------------------------------------------------------------


def render_matrix_markdown(matrix: Matrix) -> str:
    """GitHub-flavoured Markdown under 65,000 characters, whatever the matrix holds."""
    m, overview = matrix, mw.Overview(matrix)
    verdict = m.verdict.outcome
    lines = [
        f"- **Folder:** {escape(m.folder)}, against {escape(m.baseline)}",
        f"- **Speed:** {escape(overview.speed_sentence, 600)}",
        *([f"- **Bisection:** {escape(overview.change_sentence, 600)}"] if m.bisection else []),
        f"- **How sure:** {escape(overview.sure_line, 400)}",
        f"- **Oldest runtime allowed:** {escape(m.oldest_runtime) or 'none named in the manifest'}",
        f"- **Machine:** {escape(words.machine_line(m.machine), 400)}",
    ]
    blocks = [
        f"**{SIGNS[verdict]} {WORDS[verdict]}: {escape(overview.model_sentences[0], 600)}**",
        *([escape(overview.model_sentences[1], 600)] if overview.model_sentences[1] else []),
        "\n".join(lines),
        *([_table(overview, m.rows)] if m.rows else []),
        *listed("What is wrong or open", _wrong(overview)),
        *_bisection(overview),
        *bullets("Notes", overview.notes),
        repeat(m.command),
    ]
    return within(blocks, LIMIT) + "\n"


def _table(overview: mw.Overview, rows: list[MatrixRow]) -> str:
    head = ["Runtime", "Provider", "Verdict", "Parity", *mw.PARITY.values()]
    head += [cw.metric_name(x).capitalize() for x in mw.SPEED] + ["Load", "Peak"]
    cells = [
        [
            escape(row.runtime, 60),
            escape(row.provider, 30),
            f"{SIGNS[row.verdict]} {row.verdict}",
            escape(mw.parity_cell(row), 80),
            *(escape(mw.value_text(mw.measured(row, name)), 40) for name in mw.PARITY),
            *(overview.ratio(row, x) for x in mw.SPEED),
            mw.load_text(row),
            mw.peak_text(row),
        ]
        for row in rows
    ]
    text = table(head, cells, 4)
    if overview.with_speed:
        several = ", the most pressing case" if len(overview.matrix.cases) > 1 else ""
        text += f"\n\n<sub>Ratio to {escape(overview.matrix.reference, 80)}, above 1 is slower{several}.</sub>"
    return text


def _wrong(overview: mw.Overview) -> list[str]:
    found = []
    for row in overview.matrix.rows:
        said = mw.row_reasons(row) + (mw.difference_lines(row.difference) if row.difference else [])
        if said:
            more = f"; {len(said) - 5} more" if len(said) > 5 else ""
            found.append(f"**{escape(row.name, 80)}:** {'; '.join(escape(t, 400) for t in said[:5])}{more}")
    return found


def _bisection(overview: mw.Overview) -> list[str]:
    found = overview.matrix.bisection
    if found is None:
        return []
    blocks = [f"### Bisection\n\n{escape(mw.bisection_line(found), 400)}. {escape(mw.sentence(found.summary), 600)}"]
    if rows := overview.neighbours(found):
        blocks.append(_table(overview, rows))
    if found.difference:
        blocks.append("\n".join(f"- {escape(t, 400)}" for t in mw.difference_lines(found.difference)))
    if found.profile:
        heads = ["Operator", escape(found.before, 40), escape(found.after, 40), "Difference", "Ratio"]
        cells = [[escape(c, 60) for c in mw.operator_cells(t)] for t in found.profile]
        title = escape(found.profiled, 100) or "one run"
        blocks.append(f"Time by operator, {title}\n\n" + table(heads, cells, 1, 15))
    return blocks


# -- JUnit ------------------------------------------------------------------------------------------------------------


def render_matrix_junit(matrix: Matrix) -> str:
    """JUnit XML: the verdict as the first test case, so that file and exit code agree, then one a row."""
    overview = mw.Overview(matrix)
    failure = matrix.verdict.outcome.lower() if matrix.exit_code else ""
    said = [overview.headline, *matrix.verdict.reasons[:50]]
    if matrix.bisection:
        said.append(mw.bisection_line(matrix.bisection))
    verdict = told(case_of("matrix", "verdict"), failure, "\n".join(said))
    suites = {"verdict": [verdict], "matrix": [_case(row) for row in matrix.rows]}
    return document("llama-onnx-bench matrix", suites, matrix.created_utc, matrix.duration_s)


def _case(row: MatrixRow) -> ET.Element:
    case = case_of(f"matrix.{row.provider}", row.runtime, row.seconds)
    lines = [f"{row.verdict}: {mw.parity_cell(row)}", *mw.row_reasons(row)]
    lines += mw.difference_lines(row.difference) if row.difference else []
    lines += [f"{r.metric} of {r.case}: {r.status}, {r.reason}" for r in row.speed]
    lines += [f"printed: {w}" for w in row.warnings[:20]]
    message = "\n".join(lines)
    if row.outcome == mw.UNAVAILABLE:
        add(case, "skipped", "skipped", message)
        return case
    kind = row.outcome if row.outcome != "ran" else "parity" if row.parity == "FAIL" else "speed"
    return told(case, {"FAIL": kind, "INCONCLUSIVE": "inconclusive"}.get(row.verdict, ""), message)
