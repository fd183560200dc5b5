"""Raw case records of two sides -> judged results: which metric of which case moved, and how sure that is.

Statuses. REGRESSION, IMPROVED: a change that is significant after Holm over the gating family, with an estimate at or
beyond the margin. EQUIVALENT: the one-sided bound lies inside the margin. INCONCLUSIVE: neither; with the pairs that
would decide. INVALID: too few undisturbed pairs. NEW, MISSING: one side has no measurement (or only failures).

The pairs are judged once when the planned number is there and, for cases with an undecided gating metric, once more
after the extension; a decision of the first look stays. Both looks share alpha, so the extension cannot inflate it.
Every metric is a cost: a larger ratio is worse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from reports.base import grouped
from reports.comparison import CaseRecord, ChangeStatus, Family, PairResult, Result, Scalar, Verdict, in_kept_unit
from reports.errors import RecordError
from reports.paired import LEAST_PAIRS, Prior, Tested, assess, decide, pairs_needed, trimmed
from reports.render.words import times_as
from reports.validation import Status, Validation, overall

MARGIN = 0.03
DECIDING = ("ttft", "tpot")
FAILED = {"oom": "ran out of memory", "crash": "crashed", "timeout": "ran past its limit"}


@dataclass(frozen=True)
class Rules:
    """What is fixed before anything is measured. ``margins`` are relative, by metric; others have ``margin``."""

    planned: int = 10
    most: int = 15
    alpha: float = 0.05
    margin: float = MARGIN
    margins: Mapping[str, float] = field(default_factory=dict)
    gating: tuple[str, ...] | None = None
    """The metrics that decide; None: ``DECIDING``, or every metric where the records hold neither of these."""

    def margin_of(self, metric: str) -> float:
        """The metric's relative margin."""
        return self.margins.get(metric, self.margin)

    def gating_of(self, records: Iterable[CaseRecord]) -> tuple[str, ...]:
        """The metrics that decide for these records: other tools' metrics have other names than ours."""
        if self.gating is not None:
            return self.gating
        known = dict.fromkeys(m for r in records for m in r.metrics)
        return DECIDING if not known or set(known) & set(DECIDING) else tuple(sorted(known))

    @property
    def extension(self) -> str:
        """The rule of the extension, in words."""
        return (
            f"after {self.planned} valid pairs, cases with an undecided gating metric get pairs up to {self.most}, "
            f"once; each look has alpha {self.alpha / 2:g}, and a decision of the first look stays"
        )


@dataclass(frozen=True)
class Judged:
    """Results in the order of the cases, the family they were tested in, and the verdict over them."""

    results: list[Result]
    family: Family
    verdict: Verdict


@dataclass(frozen=True)
class _Row:
    case: str
    metric: str
    unit: str
    parameters: dict[str, Scalar]
    pairs: list[PairResult]
    lost: tuple[ChangeStatus, str] | None
    gating: bool

    def upto(self, limit: int) -> list[PairResult]:
        """The attempts at the first ``limit`` pairs, those that stayed invalid counted in."""
        first = set(sorted({p.index for p in self.pairs})[:limit])
        return [p for p in self.pairs if p.index in first]

    def logs(self, limit: int) -> list[float]:
        """ln(candidate / base) of the valid ones among the first ``limit`` pairs."""
        return [math.log(p.ratio) for p in self.upto(limit) if p.valid and p.ratio is not None]


Cases = dict[str, dict[int, dict[int, dict[str, CaseRecord]]]]


def _attempts(records: Iterable[CaseRecord]) -> Cases:
    """Case -> pair -> attempt -> side -> record."""
    found: Cases = {}
    for r in records:
        attempts = found.setdefault(r.case, {}).setdefault(r.pair or 0, {})
        attempts.setdefault(r.attempt, {})[r.side or "base"] = r
    return found


def unit_of(metric: str, records: Iterable[CaseRecord]) -> str:
    """The unit of a metric in the records of one case.

    Raises:
        RecordError: they have several, of which none can be turned into another.
    """
    found = {in_kept_unit(metric, r.units.get(metric))[0]: r.case for r in records if metric in r.metrics}
    if len(found) > 1:
        first, second = (repr(unit) if unit else "no unit" for unit in list(found)[:2])
        raise RecordError(
            f"{metric} of {next(iter(found.values()))} has {first} in one record and {second} in another, which do not "
            "compare; write the same in `units` of each"
        )
    return next(iter(found), in_kept_unit(metric, None)[0])


def pair_problem(sides: Mapping[str, CaseRecord]) -> str:
    """Why an attempt at a pair does not count; empty when it does."""
    for name in ("base", "candidate"):
        record = sides.get(name)
        if record is None:
            return f"{name} was not measured"
        if record.outcome != "ok":
            return f"{name} {FAILED.get(record.outcome, 'disturbed')}: {record.reason}".removesuffix(": ")
    return ""


def pairs_of(attempts_by_pair: Mapping[int, Mapping[int, Mapping[str, CaseRecord]]], metric: str) -> list[PairResult]:
    """Every attempt at every pair of one metric; at most the last one of a pair is valid."""
    made = []
    for index in sorted(attempts_by_pair):
        for attempt, sides in sorted(attempts_by_pair[index].items()):
            reason = pair_problem(sides)
            values = {name: statistics.median(r.metrics[metric]) for name, r in sides.items() if r.metrics.get(metric)}
            base, candidate = values.get("base"), values.get("candidate")
            if not reason and (base is None or candidate is None):
                reason = f"{metric} was not measured"
            first = sides["base"].position if "base" in sides else None
            made.append(
                PairResult(
                    index=index,
                    attempt=attempt,
                    base_first=None if first is None else first == 0,
                    base=base,
                    candidate=candidate,
                    ratio=_ratio(sides, metric, base, candidate),
                    valid=not reason,
                    reason=reason,
                )
            )
    return made


def _ratio(sides: Mapping[str, CaseRecord], metric: str, base: float | None, candidate: float | None) -> float | None:
    """candidate / base: of the medians, or round by round where rounds were taken in turn (see ``PairResult``)."""
    if not base or not candidate:
        return None
    rounds = [sides[name].metrics[metric] for name in ("base", "candidate")]
    if not all(r.in_turn for r in sides.values()) or len(rounds[0]) != len(rounds[1]) or len(rounds[0]) < 2:
        return candidate / base
    logs = [[math.log(c / b) for b, c in zip(*rounds, strict=True)]]
    return math.exp(float(trimmed(logs).centre[0]))


def _lost(records: Sequence[CaseRecord], metric: str) -> tuple[ChangeStatus, str] | None:
    """NEW, MISSING or INVALID where a side has no measurement at all."""
    problem: dict[str, str] = {}
    for name in ("base", "candidate"):
        own = [r for r in records if r.side == name]
        if any(r.metrics.get(metric) and r.outcome in ("ok", "invalid") for r in own):
            continue
        failures = [r for r in own if r.outcome in FAILED]
        if failures:
            last = f": {failures[-1].last_lines[-1][:200]}" if failures[-1].last_lines else ""
            said = f"{FAILED[failures[-1].outcome]} in {len(failures)} of {len(own)} attempts{last}"
            problem[name] = f"{name} {said}"
        else:
            problem[name] = f"not measured for {'the candidate' if name == 'candidate' else 'base'}"
    if len(problem) == 2:
        return "INVALID", "; ".join(problem.values())
    if "base" in problem:
        return "NEW", problem["base"]
    return ("MISSING", problem["candidate"]) if problem else None


def _rows(records: Sequence[CaseRecord], rules: Rules) -> list[_Row]:
    attempts, gating = _attempts(records), rules.gating_of(records)
    return [
        _Row(
            case,
            metric,
            unit_of(metric, own),
            own[0].parameters,
            pairs_of(attempts[case], metric),
            _lost(own, metric),
            metric in gating,
        )
        for case, own in grouped(records, lambda r: r.case).items()
        for metric in dict.fromkeys(m for r in own for m in r.metrics) or gating
    ]


def _say(status: str, t: Tested, k: int, margin: float, unit: str, have: int, needed: int | None) -> str:
    """One sentence for a tested row."""

    def words(log_ratio: float) -> str:
        change = 100 * math.expm1(log_ratio)
        worse, better = ("slower", "faster") if unit == "s" else ("more", "less")
        told = f"{abs(change):.1f} % {worse if change > 0 else better}"
        return times_as(math.exp(log_ratio), unit == "s") or told

    if status in ("REGRESSION", "IMPROVED"):
        sure = f"p = {t.p_holm[k]:.1g} after Holm"
        return f"{words(t.centre[k])}, beyond the margin of {100 * margin:g} %, and not noise ({sure})"
    if status == "EQUIVALENT":
        return f"{words(t.centre[k])}, bound {words(t.high[k])}: inside the margin of {100 * margin:g} %"
    decided = f"about {needed} pairs would decide" if needed else "more pairs than are worth measuring would be needed"
    return f"between {words(t.low[k])} and {words(t.high[k])} after {have} pairs; {decided}"


def _result(row: _Row, rules: Rules, t: Tested, k: int, status: str, size: int, look: int, used: int) -> Result:
    margin = rules.margin_of(row.metric)
    sd = float(t.error[k]) * math.sqrt(used)
    needed = None
    if status == "INCONCLUSIVE":
        needed = pairs_needed(float(t.centre[k]), sd, math.log1p(margin), size, alpha=rules.alpha, have=used)
    return _bare(row, rules).model_copy(
        update={
            "status": status,
            "reason": _say(status, t, k, margin, row.unit, used, needed),
            **t.row(k),
            "sd_log": sd,
            "look": look,
            "pairs_needed": needed,
        }
    )


def _bare(row: _Row, rules: Rules) -> Result:
    """What is known without a test; INVALID where nothing else was found."""
    valid = [p for p in row.pairs if p.valid]
    status, reason = row.lost or ("INVALID", f"only {len(valid)} of {len(row.pairs)} pairs were undisturbed")
    shown = valid or row.pairs
    bases = [p.base for p in shown if p.base]
    candidates = [p.candidate for p in shown if p.candidate]
    return Result(
        case=row.case,
        metric=row.metric,
        unit=row.unit,
        gating=row.gating,
        status=status,
        reason=reason,
        margin=rules.margin_of(row.metric),
        parameters=row.parameters,
        base_median=statistics.median(bases) if bases else None,
        candidate_median=statistics.median(candidates) if candidates else None,
        pairs=row.pairs,
    )


def judge(records: Sequence[CaseRecord], rules: Rules | None = None) -> Judged:
    """Judge interleaved pairs.

    Args:
        records: of both sides, each with ``side`` and ``pair``; repeated and failed attempts included.
        rules: None for the defaults.
    """
    rules = rules or Rules()
    rows = _rows(records, rules)
    results: dict[int, Result] = {k: _bare(row, rules) for k, row in enumerate(rows)}
    able = [k for k, row in enumerate(rows) if row.lost is None and len(row.logs(rules.planned)) >= LEAST_PAIRS]
    size = sum(rows[k].gating for k in able)
    priors: dict[str, Prior] = {}
    undecided: set[str] = set()
    for look in (1, 2):
        chosen = able if look == 1 else [k for k in able if rows[k].case in undecided]
        if not chosen:
            break
        # In the second look only the undecided ones may still be decided; the family keeps its size.
        gating = np.array([rows[k].gating and (look == 1 or results[k].status == "INCONCLUSIVE") for k in chosen])
        limit = rules.planned if look == 1 else rules.most
        logs = [rows[k].logs(limit) for k in chosen]
        tested = assess(logs, [rows[k].metric for k in chosen], size, gating, alpha=rules.alpha)
        margins = np.array([math.log1p(rules.margin_of(rows[k].metric)) for k in chosen])
        statuses = decide(tested, margins, rules.alpha)
        if look == 1:
            priors = {str(m): p for m, p in tested.priors.items()}
        for at, k in enumerate(chosen):
            if look == 1 or results[k].status == "INCONCLUSIVE":
                cut = replace(rows[k], pairs=rows[k].upto(limit))
                results[k] = _result(cut, rules, tested, at, str(statuses[at]), size, look, len(logs[at]))
        undecided = {
            rows[k].case
            for k in able
            if rows[k].gating
            and results[k].status == "INCONCLUSIVE"
            and len({p.index for p in rows[k].pairs}) > rules.planned
        }
    ordered = [results[k] for k in range(len(rows))]
    family = Family(
        size=size,
        alpha=rules.alpha,
        margins={m: rules.margin_of(m) for m in dict.fromkeys(row.metric for row in rows)},
        gating_metrics=list(rules.gating_of(records)),
        planned_pairs=rules.planned,
        most_pairs=rules.most,
        method="moderated paired t on the pairs' trimmed log ratios (Yuen; Smyth), Holm over the family, two looks",
        extension_rule=rules.extension,
        prior_df={m: p.df if math.isfinite(p.df) else 1e9 for m, p in priors.items()},
        prior_sd={m: math.sqrt(p.variance) for m, p in priors.items()},
    )
    return Judged(ordered, family, verdict_of(ordered, records))


def needs_extension(records: Sequence[CaseRecord], rules: Rules) -> list[str]:
    """Cases that the rule of the extension gives more pairs, judged on the planned pairs."""
    first = judge(records, replace(rules, most=rules.planned))
    return list(dict.fromkeys(r.case for r in first.results if r.gating and r.status == "INCONCLUSIVE"))


STATUS: dict[ChangeStatus, Status] = {
    "REGRESSION": "FAIL",
    "MISSING": "FAIL",
    "INCONCLUSIVE": "INCONCLUSIVE",
    "INVALID": "INCONCLUSIVE",
    "IMPROVED": "PASS",
    "EQUIVALENT": "PASS",
    "NEW": "REPORTED",
}
"""What a gating result counts as in the verdict."""


def verdict_of(
    results: Sequence[Result], records: Sequence[CaseRecord] = (), validation: Validation | None = None
) -> Verdict:
    """One verdict for speed and parity together: a faster candidate that fails parity is a failure."""
    gating = [r for r in results if r.gating]

    def told(word: Status) -> list[str]:
        return [f"{r.metric} of {r.case}: {r.reason}" for r in gating if STATUS[r.status] == word]

    failed, open_ = told("FAIL"), told("INCONCLUSIVE")
    crashed: dict[str, str] = {}
    base_failures = {r.case for r in records if r.side == "base" and r.outcome in FAILED}
    missing = {r.case for r in gating if r.status == "MISSING"}
    for r in records:
        if r.side == "candidate" and r.outcome in FAILED and r.case not in base_failures | missing:
            crashed[r.case] = f"{r.case}: the candidate {FAILED[r.outcome]} at least once, base never"
    failed += crashed.values()
    statuses = [STATUS[r.status] for r in gating] + ["FAIL"] * bool(crashed)
    if validation is not None:
        said = [f"parity, {r}" for r in validation.reasons]
        if validation.verdict == "FAIL":
            failed = ["parity: the candidate is no longer the same model", *said, *failed]
        elif validation.verdict == "INCONCLUSIVE":
            open_ = ["parity: undecided", *said, *open_]
        statuses += [validation.verdict] if gating or validation.verdict != "PASS" else []
    outcome = overall(statuses)
    if outcome == "PASS":
        return Verdict(outcome=outcome, reasons=["every gating metric is equivalent or better"])
    return Verdict(outcome=outcome, reasons=failed + open_ or ["no gating metric was compared"])
