"""What paired runs come to: the judged document, with the past of its metrics and what a reader has to know besides."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from bench.latency.paired_run import Plan, learned
from bench.machine.environment import versions
from reports.base import Machine
from reports.compare import judge, verdict_of
from reports.comparison import CaseRecord, Comparison, History, Result
from reports.validation import Validation


def judged_document(
    plan: Plan,
    records: Sequence[CaseRecord],
    *,
    command: list[str],
    machine: Machine,
    duration_s: float,
    validation: Validation | None = None,
) -> Comparison:
    """The records of a plan, judged.

    Args:
        plan: what was measured.
        records: all of them.
        command: how to repeat it.
        machine: where.
        duration_s: of the measurement.
        validation: the gate over the candidate.
    """
    judged = judge(records, plan.rules)
    measured = learned(plan.candidate.described(), list(records))
    return Comparison(
        schema_version=1,
        tool_version=versions().get("llama-onnx-bench", "unknown"),
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        duration_s=duration_s,
        command=command,
        seed=plan.seed,
        paired=True,
        advisory=False,
        base=learned(plan.base.described(), list(records)),
        candidate=measured,
        family=judged.family,
        verdict=verdict_of(judged.results, records, validation),
        results=judged.results,
        validation=validation,
        machine=machine,
        history=past(judged.results, machine.fingerprint, measured.model),
        records=list(records),
        versions=versions(),
        warnings=warnings_of(records, judged.results, validation),
    )


def past(results: Sequence[Result], fingerprint: str, model: str | None) -> list[History]:
    """The gating metrics' past from the user's store; empty where nothing was added to it."""
    from reports.store import Store, default_path

    if not default_path().is_file():
        return []
    with Store(default_path()) as store:
        known = {(p.case_name, p.metric) for p in store.points(fingerprint)}
        asked = [(r.case, r.metric) for r in results if r.gating and (r.case, r.metric) in known]
        found = [store.history(*key, fingerprint, model) for key in asked]
    return [h for h in found if h is not None]


def warnings_of(records: Sequence[CaseRecord], results: Sequence[Result], validation: Validation | None) -> list[str]:
    """What a reader has to know: repeated pairs, warm-ups that never became steady, a speed-up without parity."""
    said = []
    disturbed = [r for r in records if r.disturbed]
    if disturbed:
        said.append(f"{len(disturbed)} of {len(records)} processes were disturbed; first: {disturbed[0].reason}")
    unsteady = sum(1 for r in records if r.steady is False)
    if unsteady:
        said.append(f"{unsteady} of {len(records)} warm-ups reached their cap before two rounds agreed within 5 %")
    if validation is None and any(r.status == "IMPROVED" for r in results):
        said.append("faster, but nobody looked whether it is still the same model: add --model CHECKPOINT for parity")
    return said
