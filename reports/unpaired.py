"""Two files of records, judged: in pairs where they were measured in pairs, else by Welch's test with a stricter rule.

Runs that were not interleaved meet another machine each: what differs may be the hour and not the change. So unpaired
files need five processes a side on one machine, and a change counts only where it is surely *beyond the margin* (not
only surely a change): so an hour that is worth up to the margin fails no pipeline. Anything less says why.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from reports.base import grouped
from reports.compare import Rules, judge, unit_of, verdict_of
from reports.comparison import CaseRecord, ChangeStatus, ComparedSide, Comparison, Family, Result, SideName, Verdict
from reports.paired import LEAST_PAIRS, RESOLUTION, decide, holm, tested

UNPAIRED = "the two sides were not measured in interleaved pairs: what differs may be the hour, not the change"
FEW = f"a process has its own luck, which its rounds share; {LEAST_PAIRS} or more processes a side decide"
MACHINES = "the two sides come from different machines"


def in_pairs(base: Sequence[CaseRecord], candidate: Sequence[CaseRecord]) -> bool:
    """Whether both files come from one run that interleaved them: a record of such a run names its side itself.

    The records of two sweeps have run and pair as well, and were measured on another day.
    """
    records = (*base, *candidate)
    runs = {r.run for r in records}
    one = len(runs) == 1 and None not in runs and _machines(base, candidate) <= 1
    return one and all(r.pair is not None and r.side is not None for r in records)


def _processes(records: Sequence[CaseRecord], metric: str) -> list[list[float]]:
    return [r.metrics[metric] for r in records if r.outcome == "ok" and r.metrics.get(metric)]


def _values(records: Sequence[CaseRecord], metric: str) -> NDArray[np.float64]:
    """ln of each process's median; of a single process its rounds, from which nothing is decided."""
    ok = _processes(records, metric)
    if len(ok) == 1:
        return np.array([math.log(v) for v in ok[0]])
    return np.array([math.log(statistics.median(v)) for v in ok])


def welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """Difference of means b - a, its standard error and Welch-Satterthwaite degrees of freedom (Welch 1947).

    Raises:
        ValueError: fewer than two values on a side.
    """
    if min(a.size, b.size) < 2:
        raise ValueError("Welch's test needs two values on each side")
    va, vb = (max(float(x.var(ddof=1)), RESOLUTION**2) / x.size for x in (a, b))
    df = (va + vb) ** 2 / (va**2 / (a.size - 1) + vb**2 / (b.size - 1))
    return float(b.mean() - a.mean()), math.sqrt(va + vb), df


def _machines(base: Sequence[CaseRecord], candidate: Sequence[CaseRecord]) -> int:
    """How many machines the records name."""
    return len({r.fingerprint for r in (*base, *candidate) if r.fingerprint})


@dataclass(frozen=True)
class _Row:
    """One metric of one case: what is known without a test, both sides' logarithms, why no test may decide."""

    result: Result
    base: NDArray[np.float64]
    candidate: NDArray[np.float64]
    why: str

    @property
    def testable(self) -> bool:
        return min(self.base.size, self.candidate.size) >= 2


def judge_unpaired(
    base: Sequence[CaseRecord], candidate: Sequence[CaseRecord], rules: Rules
) -> tuple[list[Result], Family]:
    """One result a case and metric."""
    gating = rules.gating_of((*base, *candidate))
    elsewhere = MACHINES if _machines(base, candidate) > 1 else ""
    rows = []
    for case, own in _by_case(base, candidate).items():
        metrics = dict.fromkeys(m for records in own for r in records for m in r.metrics)
        rows += [_row(case, m, own, rules.margin_of(m), m in gating, elsewhere) for m in metrics or gating]
    able = [row for row in rows if row.testable]
    size = sum(row.result.gating for row in able)
    decided = iter(_decided(able, size, rules) if able else ())
    results = [next(decided) if row.testable else row.result for row in rows]
    family = Family(
        size=size,
        alpha=rules.alpha,
        margins={r.metric: r.margin for r in results},
        gating_metrics=list(gating),
        planned_pairs=0,
        most_pairs=0,
        method="Welch's t on logs of process medians, Holm over the family; unpaired: a change needs "
        f"{LEAST_PAIRS} processes a side, and to be surely beyond the margin",
        extension_rule="none: files are judged as they are",
    )
    return results, family


def _by_case(
    base: Sequence[CaseRecord], candidate: Sequence[CaseRecord]
) -> dict[str, tuple[list[CaseRecord], list[CaseRecord]]]:
    """The records of both sides by case, the base's cases first."""
    sides = [grouped(records, lambda r: r.case) for records in (base, candidate)]
    return {case: (sides[0].get(case, []), sides[1].get(case, [])) for case in sides[0] | sides[1]}


def _decided(rows: Sequence[_Row], size: int, rules: Rules) -> list[Result]:
    """The rows' results by Welch's test."""
    centre, error, df = (np.array(x) for x in zip(*(welch(r.base, r.candidate) for r in rows), strict=True))
    member = np.array([r.result.gating for r in rows])
    margins = np.array([math.log1p(r.result.margin) for r in rows])
    found = tested(centre, error, df, size, member, rules.alpha / 2)
    statuses = decide(found, margins, rules.alpha)
    beyond = holm(stdtr(df, (margins - np.abs(centre)) / error), size, member)
    results = []
    for i, row in enumerate(rows):
        moved = statuses[i] in ("REGRESSION", "IMPROVED")
        unsure = f"not surely beyond the margin (p = {beyond[i]:.1g} after Holm)"
        reason = row.why or (unsure if moved and beyond[i] > rules.alpha else "")
        told = found.row(i)
        said = f"ratio {told['ratio']:.3f}, between {told['low']:.3f} and {told['high']:.3f}"
        update = {
            "status": "INCONCLUSIVE" if reason else str(statuses[i]),
            "reason": f"{said}; {reason or 'not measured in pairs'}",
            **told,
            "sd_log": float(error[i]),
        }
        results.append(row.result.model_copy(update=update))
    return results


def _row(
    case: str,
    metric: str,
    own: tuple[list[CaseRecord], list[CaseRecord]],
    margin: float,
    gating: bool,
    elsewhere: str,
) -> _Row:
    a, b = (_values(records, metric) for records in own)
    least = min(len(_processes(records, metric)) for records in own)
    few = f"{least} process{'es' * (least > 1)} on a side: {FEW}" if least < LEAST_PAIRS else ""
    known: dict[tuple[bool, bool], tuple[ChangeStatus, str]] = {
        (True, True): ("INCONCLUSIVE", elsewhere or few),  # of two samples on each side or more the test decides
        (True, False): ("MISSING", "not measured for the candidate"),
        (False, True): ("NEW", "not measured for base"),
        (False, False): ("INVALID", "neither side has a sample"),
    }
    status, reason = known[bool(a.size), bool(b.size)]
    result = Result(
        case=case,
        metric=metric,
        unit=unit_of(metric, chain(*own)),
        gating=gating,
        status=status,
        reason=reason,
        margin=margin,
        parameters=next(chain(*own)).parameters,
        ratio=math.exp(float(np.median(b) - np.median(a))) if a.size and b.size else None,
        base_median=math.exp(float(np.median(a))) if a.size else None,
        candidate_median=math.exp(float(np.median(b))) if b.size else None,
    )
    return _Row(result, a, b, elsewhere or few)


def _side(name: SideName, label: str, records: Sequence[CaseRecord]) -> ComparedSide:
    facts = dict(records[0].details)
    keys = ("model", "precision", "weights_sha256", "spec_digest")
    known: dict[str, Any] = {key: str(facts.pop(key)) for key in keys if key in facts}
    return ComparedSide(name=name, label=label, text=label, versions=records[0].versions, details=facts, **known)


def _named(records: Sequence[CaseRecord], side: SideName) -> list[CaseRecord]:
    return [r.model_copy(update={"side": side}) for r in records]


def compare_files(
    base: Sequence[CaseRecord],
    candidate: Sequence[CaseRecord],
    rules: Rules | None = None,
    *,
    labels: tuple[str, str] = ("base", "candidate"),
    command: Sequence[str] = (),
    versions: dict[str, str] | None = None,
    started: float | None = None,
) -> Comparison:
    """Judge two lists of records. Advisory unless measured in pairs, or by enough processes of one machine.

    Args:
        base, candidate: records of each side (:func:`reports.case_files.read_any`).
        rules: margins, alpha and gating metrics; None for the defaults.
        labels: names of the sides; ``command``, ``versions``, ``started`` (unix seconds) go into the result.
    """
    rules = rules or Rules()
    paired = in_pairs(base, candidate)
    base, candidate = _named(base, "base"), _named(candidate, "candidate")
    records = [*base, *candidate]
    machines = _machines(base, candidate)
    warnings = [f"records come from {machines} different machines"] if machines > 1 else []
    advisory = ""
    if paired:
        judged = judge(records, rules)
        results, family, verdict = judged.results, judged.family, judged.verdict
    else:
        results, family = judge_unpaired(base, candidate, rules)
        advisory = _why_advisory(base, candidate, results)
        verdict = _verdict(results) if advisory else verdict_of(results, records)
        warnings += [] if advisory else [f"unpaired: {UNPAIRED}; a change counts where it is surely beyond the margin"]
        warnings += [] if all(r.fingerprint for r in records) else ["records that do not say which machine they are of"]
    now = time.time()
    return Comparison(
        schema_version=1,
        tool_version=(versions or {}).get("llama-onnx-bench", "unknown"),
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        duration_s=0.0 if started is None else max(0.0, now - started),
        command=list(command),
        seed=None,
        paired=paired,
        advisory=bool(advisory),
        advisory_reason=advisory,
        base=_side("base", labels[0], base),
        candidate=_side("candidate", labels[1], candidate),
        family=family,
        verdict=verdict,
        results=results,
        records=records,
        versions=versions or {},
        warnings=warnings,
    )


def _why_advisory(base: Sequence[CaseRecord], candidate: Sequence[CaseRecord], results: Sequence[Result]) -> str:
    """Why unpaired records decide nothing; "" where one gating result has enough processes of one machine."""
    if _machines(base, candidate) > 1:
        return f"{UNPAIRED}; {MACHINES}"
    cases = _by_case(base, candidate)
    most = max((min(len(_processes(x, r.metric)) for x in cases[r.case]) for r in results if r.gating), default=0)
    return "" if most >= LEAST_PAIRS else f"{UNPAIRED}; {FEW}"


def _verdict(results: Sequence[Result]) -> Verdict:
    """Advice never fails a pipeline: what would be a failure is inconclusive until it is measured in pairs."""
    found = verdict_of(results)
    if found.outcome != "FAIL":
        return found
    return Verdict(outcome="INCONCLUSIVE", reasons=[f"advisory: {r}" for r in found.reasons])
