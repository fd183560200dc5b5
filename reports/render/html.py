"""The page: one self-contained ``index.html`` that answers on its first screen and works offline.

Everything from the record is data: jinja2 escapes it. The only markup taken as it is are the plots of this
package.

Try: ``python -c "import pathlib, reports.record as r, reports.publish as p;
print(p.write_report(r.RunRecord.read(pathlib.Path('reports/out/record.json')), pathlib.Path('/tmp/page')))"``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from reports.base import grouped
from reports.record import RunRecord
from reports.render import parity, plots, words
from reports.render.environment import render
from reports.stats import SPREAD_LIMIT, Estimate, median
from reports.summary import (
    floor_rows,
    floor_s,
    gap_rows,
    headline_case,
    latency_rows,
    load_rows,
    memory_rows,
    ordered_sides,
    prefill_cases,
    prefill_limit,
    prefill_rows,
)
from reports.verdict import Verdict, judge, other_outcomes

SECTIONS = (
    ("latency", "Latency"),
    ("targets", "Targets"),
    ("parity", "Parity"),
    ("memory", "Memory and load"),
    ("tests", "Tests"),
    ("reproduce", "Reproduce"),
    ("glossary", "Glossary"),
)


def render_html(record: RunRecord) -> str:
    """The whole page of a record; equal records give equal bytes."""
    return render("index.html.j2", record, _context(record), {"sure": sure})


def sure(speedup: Estimate) -> str:
    """The interval of a speed-up in words, with what it allows to claim."""
    if speedup.low is None or speedup.high is None:
        return f"no interval from {speedup.n} round{'s' * (speedup.n != 1)}"
    text = f"95\u00a0% interval {words.fixed(speedup.low)}\u00a0to\u00a0{words.fixed(speedup.high)}"
    if speedup.low <= 1 <= speedup.high:
        return f"{text}, no difference shown"
    return text if speedup.low > 1 else f"{text}, slower"


def sure_line(record: RunRecord, verdict: Verdict) -> str:
    """What the answers rest on, in one line."""
    rounds = f"{verdict.rounds} round{'s' * (verdict.rounds != 1)} a side" if verdict.rounds else "no rounds"
    case = headline_case(record)
    where = f" ({case.label})" if case else ""
    scored = f"{verdict.tokens_scored:,} tokens scored" if verdict.tokens_scored else "no tokens scored"
    v = record.validation
    items = len(v.evidence.outputs) if v else 0
    answers = f", {items:,} answers compared" if items else ""
    count = len(verdict.warnings)
    warned = f", {count} warning{'s' * (count != 1)}" if count else ""
    return f"{rounds}{where}, {scored}{answers}{warned}"


def facts(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model, machine, versions, settings and sides as pairs of name and value."""
    model = record.model
    fused = ", ".join(f"{name} × {count}" for name, count in model.fused_ops.items()) or "none"
    found = [
        (
            "Model",
            [
                ("Name", model.name),
                ("Origin", model.origin),
                ("Weights", "random, not trained" if model.random_weights else "trained"),
                ("Parameters", f"{model.parameters:,}"),
                ("Precision, target", f"{model.precision}, {model.target}"),
                ("Context", f"{model.context_length:,} tokens"),
                ("Folder", words.size(model.folder_bytes)),
                ("Graph", f"{model.node_count:,} nodes; fused: {fused}"),
                ("Weights SHA-256", model.weights_sha256),
                ("Spec digest", model.spec_digest),
            ],
        ),
        ("Machine", words.machine_facts(record.machine)),
        (
            "Run",
            [
                ("Started", record.created_utc),
                ("Took", words.duration(record.duration_s)),
                ("Profile", record.profile),
                ("Seed", str(record.seed)),
                *((name, words.plain(value)) for name, value in record.settings.items()),
            ],
        ),
        ("Versions", list({"llama-onnx-bench": record.tool_version, **record.versions}.items())),
    ]
    if record.validation is not None:
        found += parity.facts(record.validation)
    for side in ordered_sides(record):
        if side.details:
            found.append((side.title, [(name, words.plain(value)) for name, value in side.details.items()]))
    return found


def _context(record: RunRecord) -> dict[str, Any]:
    verdict, case = judge(record), headline_case(record)
    prompts = prefill_cases(record)
    tests = other_outcomes(record)
    return {
        "record": record,
        **parity.context(record.validation),
        "verdict": verdict,
        "case": case,
        "sections": SECTIONS,
        "model_line": words.model_line(record),
        "sure_line": sure_line(record, verdict),
        "latency": list(grouped(latency_rows(record), lambda r: r.case).values()),
        "warmups": ", ".join(str(n) for n in sorted({s.warmup_rounds for s in record.series})),
        "gap_rows": gap_rows(record, case) if case else [],
        "floor_rows": floor_rows(record, case) if case else [],
        "floor": floor_s(record, case) if case else None,
        "bandwidth": median(record.floor.bandwidth_samples).value if record.floor else None,
        "prompts": prompts,
        "prefill": prefill_rows(record),
        "prefill_limits": [prefill_limit(record, c) for c in prompts],
        "prefill_words": words.prefill_words(record),
        "memory": memory_rows(record),
        "loads": load_rows(record),
        "styles": plots.side_styles(record),
        "plots": plots.all_plots(record),
        "outcome_counts": list(Counter(o.outcome for o in tests).items()),
        "outcomes_told": [o for o in tests if o.outcome != "passed"],
        "facts": facts(record),
        "glossary": (*words.GLOSSARY, *((words.PREFILL_FLOOR,) if record.prefill_floor else ())),
        "ratio_note": words.RATIO_NOTE,
        "spread_limit": SPREAD_LIMIT,
        "source": "record.json",
    }
