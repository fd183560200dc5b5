"""The page of a comparison: one self-contained ``index.html`` with the verdict on its first screen.

Everything from a comparison is data: jinja2 escapes it. A large family stays light: the first rows of the table are in
the page, the rest wait in an inert ``<template>`` for the script; the forest plot and the cases' plots are cut, and
the page says by how much.

Try: ``python -c "import pathlib, reports.comparison as c, reports.render.comparison_html as h;
print(len(h.render_comparison(c.Comparison.read(pathlib.Path('comparison.json')))))"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reports.comparison import ComparedSide, Comparison, Result
from reports.comparison_summary import STATUS_ORDER, CaseGroup, Digest
from reports.render import comparison_plots as plots
from reports.render import comparison_words as cw
from reports.render import parity, svg, words
from reports.render.environment import by_name, render
from reports.verdict import WORDS

ROWS_SHOWN, FOREST_SHOWN, CASES_SHOWN, OPENED = 200, 60, 40, 3
TROUBLES_SHOWN, HISTORY_SHOWN, WARNINGS_SHOWN = 12, 60, 40


_FILTERS = (
    *(cw.value, cw.tidy, cw.signed, cw.signed_interval, cw.ratio_text, cw.ratio_interval, cw.p_text),
    *(cw.case_text, cw.metric_name, cw.metric_title, cw.step_text, plots.sparkline),
)


@dataclass(frozen=True)
class CaseView:
    """One case with its plots."""

    group: CaseGroup
    opened: bool
    metrics: list[tuple[Result, list[svg.Plot]]]
    trace: svg.Plot | None


def render_comparison(comparison: Comparison) -> str:
    """The whole page of a comparison; equal comparisons give equal bytes."""
    digest = Digest(comparison)
    filters = by_name(_FILTERS) | {
        "tone_of": lambda status: cw.tone(status, digest),
        "glyph": lambda status: cw.LOOKS[status].glyph,
        "key": lambda value: "" if value is None else f"{value:.6g}",
    }
    return render("comparison.html.j2", comparison, _context(digest) | {"source": "comparison.json"}, filters)


def _context(digest: Digest) -> dict[str, Any]:
    c = digest.comparison
    views = _cases(digest)
    first, second = cw.verdict_sentences(digest)
    return {
        "c": c,
        "sections": [
            ("forest", "Changes"),
            ("results", "All results"),
            *([("cases", "Cases")] if views else []),
            ("parity", "Parity"),
            *([("history", "History")] if c.history else []),
            ("reproduce", "Reproduce"),
        ],
        "digest": digest,
        "word": WORDS[c.verdict.outcome],
        "first": first,
        "second": second,
        **parity.context(c.validation),
        "answers": [(g, g.leading) for g in digest.metrics if g.leading is not None][:2],
        "sure_line": cw.sure_line(c),
        "differences": cw.differences(c),
        "statuses": STATUS_ORDER,
        "forests": _forests(digest),
        "rows": digest.by_importance[:ROWS_SHOWN],
        "more_rows": digest.by_importance[ROWS_SHOWN:],
        "page_size": ROWS_SHOWN,
        "cases": views,
        "shown_cases": {v.group.case: v.group.index for v in views},
        "cases_cut": len(digest.cases) - len(views),
        "history": c.history[:HISTORY_SHOWN],
        "warnings": c.warnings[:WARNINGS_SHOWN],
        "warnings_cut": max(len(c.warnings) - WARNINGS_SHOWN, 0),
        "troubles_shown": TROUBLES_SHOWN,
        "facts": _facts(digest),
        "glossary": cw.GLOSSARY,
    }


def _forests(digest: Digest) -> list[tuple[str, plots.Forest]]:
    """A plot a metric, gating ones on one axis and the others on theirs; of a large family the most pressing only."""
    shown = digest.by_importance[:FOREST_SHOWN]
    chosen, gates = {id(r) for r in shown}, {g.metric for g in digest.metrics if g.gating}
    axes = {gating: plots.forest_axis([r for r in shown if (r.metric in gates) == gating]) for gating in (True, False)}
    groups = []
    for group in digest.metrics:
        found = [r for r in group.results if id(r) in chosen]
        if found:
            title = cw.metric_title(group.metric) + ("" if group.gating else " (not gating)")
            groups.append((title, plots.forest(found, axes[group.gating], len(group.results) - len(found))))
    return groups


def _cases(digest: Digest) -> list[CaseView]:
    views = []
    for rank, group in enumerate(digest.cases[:CASES_SHOWN]):
        metrics = [
            (r, [f for f in (plots.pairs_plot(r), plots.distribution(r, group.records)) if f]) for r in group.results
        ]
        trace = plots.machine_trace(group.records)
        views.append(CaseView(group, rank < OPENED and group.pressing, metrics, trace))
    return views


def _pairing(c: Comparison) -> str:
    if not c.paired:
        return "no"
    in_turn = sum(bool(r.in_turn) for r in c.records)
    if not in_turn:
        return "yes, process after process"
    return "yes, rounds in turn" if in_turn == len(c.records) else f"yes, rounds in turn in {in_turn:,} processes"


def _facts(digest: Digest) -> list[tuple[str, list[tuple[str, str]]]]:
    c, f = digest.comparison, digest.comparison.family
    priors = [
        f"{cw.metric_name(m)} {f.prior_sd[m]:.2%}, {df:.1f} df" for m, df in f.prior_df.items() if m in f.prior_sd
    ]
    statistics = [
        ("Family", f"{f.size} gating results, {len(c.results)} in all"),
        ("Alpha", f"{f.alpha:g}, family-wise"),
        ("Method", f.method),
        ("Pairs", f"{f.planned_pairs} planned, {f.most_pairs} at most"),
        ("Extension", f.extension_rule),
        *((f"Margin, {cw.metric_name(m)}", f"{v * 100:g} %") for m, v in f.margins.items()),
        *([("Variance prior", "; ".join(priors))] if priors else []),
    ]
    run = [
        ("Started", words.when(c.created_utc)),
        ("Took", words.duration(c.duration_s)),
        ("Seed", words.DASH if c.seed is None else str(c.seed)),
        ("Processes", f"{len(c.records):,} recorded, {sum(r.outcome != 'ok' for r in c.records):,} not counted"),
        ("Measured in pairs", _pairing(c)),
    ]
    found = [("Statistics", statistics), ("Run", run), ("Base", _side(c.base)), ("Candidate", _side(c.candidate))]
    if c.machine is not None:
        found.append(("Machine", words.machine_facts(c.machine)))
    found.append(("Versions", list({"llama-onnx-bench": c.tool_version, **c.versions}.items())))
    return found


def _side(side: ComparedSide) -> list[tuple[str, str]]:
    told = [
        ("Label", side.label),
        ("Given as", side.text),
        ("Model", side.model),
        ("Precision", side.precision),
        ("Folder", side.folder),
        ("Provider", side.provider),
        ("Environment", side.venv),
        ("Revision", side.revision),
        ("Weights SHA-256", side.weights_sha256),
        ("Spec digest", side.spec_digest),
    ]
    extra = {**side.options, **side.details, **side.versions}
    return [(name, value) for name, value in told if value] + [(k, words.plain(v)) for k, v in extra.items()]
