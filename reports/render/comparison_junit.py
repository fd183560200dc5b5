"""``junit.xml`` of a comparison: one test case a result, so that a CI system's test view shows what moved.

A failure is what makes the exit code: a gating result that is worse, missing, undecided or disturbed, a speed-up
without parity, a parity check. The first test case is the verdict itself, so the file and the exit code agree.

Try: ``python -c "import pathlib, reports.comparison as c, reports.render.comparison_junit as j;
print(j.render_comparison_junit(c.Comparison.read(pathlib.Path('comparison.json'))))"``.
"""

from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree as ET

from reports.comparison import CaseRecord, Comparison, Result
from reports.comparison_summary import Digest
from reports.render import comparison_words as cw
from reports.render import parity
from reports.render.junit import case_of, document, parity_cases, told


def render_comparison_junit(comparison: Comparison) -> str:
    """JUnit XML of a comparison (the Jenkins dialect that GitHub, GitLab and Jenkins viewers read)."""
    digest = Digest(comparison)
    seconds: dict[str, float] = defaultdict(float)
    troubles: dict[str, list[CaseRecord]] = defaultdict(list)
    for record in comparison.records:
        seconds[record.case] += record.duration_s or 0.0
        if record.last_lines:
            troubles[record.case].append(record)
    counted: set[str] = set()
    cases = []
    for r in comparison.results:
        # A process measures all metrics of a case at once: its time counts once.
        time = 0.0 if r.case in counted else seconds[r.case]
        counted.add(r.case)
        cases.append(_result(r, digest, time, troubles[r.case]))
    suites = {"verdict": [_verdict(digest)], "compare": cases, "parity": parity_cases(comparison.validation)}
    return document("llama-onnx-bench compare", suites, comparison.created_utc, comparison.duration_s)


def _verdict(digest: Digest) -> ET.Element:
    c = digest.comparison
    failure = c.verdict.outcome.lower() if c.verdict.exit_code else ""
    return told(case_of("compare", "verdict"), failure, "\n".join([cw.headline(digest), *c.verdict.reasons[:50]]))


def _result(r: Result, digest: Digest, seconds: float, troubles: list[CaseRecord]) -> ET.Element:
    case = case_of(f"compare.{cw.metric_name(r.metric).replace(' ', '_')}", r.case, seconds)
    interval = f", 95 % interval {cw.signed_interval(r)}" if r.low is not None else ""
    message = (
        f"{r.status}: {r.reason}. Change {cw.signed(r.ratio)}{interval}; "
        f"{cw.value(r.candidate_median, r.unit)} against {cw.value(r.base_median, r.unit)}; "
        f"p (Holm) {cw.p_text(r.p_holm)}; {r.valid_pairs} pairs; margin {r.margin * 100:g} %"
    )
    if r.status == "IMPROVED":
        message += f"; {parity.short(digest.comparison.validation)}"
    for record in troubles[:3]:
        message += f"\n{record.side or 'unpaired'}, {record.outcome}: " + "\n".join(record.last_lines[-10:])
    if cw.tone(r.status, digest) in ("fail", "open") and r.gating and not digest.comparison.advisory:
        return told(case, "parity" if r.status == "IMPROVED" else r.status.lower(), message)
    note = "advisory, does not gate. " if digest.comparison.advisory else "" if r.gating else "does not gate. "
    return told(case, "", note + message)
