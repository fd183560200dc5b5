"""The statistical checks as pure functions: evidence and terms in, result out.

A check collects its evidence from the running models and hands it to the function of the same name here;
:mod:`bench.gate.replay` does so again with the evidence of a document.
Try: ``python -m pytest tests/bench/gate/test_replay.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.gate import statistics
from bench.gate.found import Found
from bench.gate.metrics import Scored, difference_interval, score_interval
from bench.gate.modes import SEED, Terms
from bench.gate.statistics import Tier, TokenScores, chunks_needed, decide
from reports.validation import (
    ChunkScores,
    Evidence,
    Finding,
    GeneratedItem,
    Measurement,
    Status,
    TaskEvidence,
    TaskMetric,
    worst,
)

LENGTH_BAND = (0.9, 1.1)
LEAST_CHUNKS = 2
LEAST_ITEMS = 12
FLOOR_SCORE = 5.0
"""Below so many points of 100 the baseline itself cannot do a task: references say nothing about a candidate there."""
NO_PROSE = "the dataset has no prose to score"
NO_ITEMS = "the dataset has nothing to generate from"
TOO_SHORT = "the texts or the context are too short"
UNPROBED = "a bf16 cache cannot be stacked: numpy has no such type"
SHORT_FLOATS_ONLY = "judged for fp16 and bf16 only"
NOT_APPLICABLE = (UNPROBED, SHORT_FLOATS_ONLY)
PROBE_CACHE = ("chunked_prefill", "long_context")
"""Checks that stack a cache of their own."""
Judge = Callable[[Evidence, Terms], Found]
Decision = tuple[bool, float, float, str]
"""Whether it is good, value, limit and detail."""


def not_applicable(name: str, terms: Terms) -> str | None:
    """Why this check has nothing to say about a folder of this precision, however much evidence there is."""
    if name in PROBE_CACHE and terms.kv_dtype == "bf16":
        return UNPROBED
    return SHORT_FLOATS_ONLY if name == "null_ratio" and not terms.short_floats else None


# -- tokens ----------------------------------------------------------------------------------------------------------


def arrays_of(chunk: ChunkScores) -> TokenScores:
    """A chunk of a document as arrays."""
    nll, nll_baseline, kld = (np.asarray(v, np.float64) for v in (chunk.nll_candidate, chunk.nll_baseline, chunk.kld))
    return TokenScores(nll, nll_baseline, kld, np.asarray(chunk.same_top1, np.bool_))


def chunk_of(scores: TokenScores) -> ChunkScores:
    """Arrays as a chunk of a document."""
    return ChunkScores(**{name: values.tolist() for name, values in vars(scores).items()})


def _own_loss(evidence: Evidence, null: Sequence[TokenScores]) -> statistics.OwnLoss:
    def of(k: int) -> NDArray[np.float64]:
        return null[k].kld if k < len(null) else np.asarray(evidence.own_loss[k], np.float64)

    return of


def tokens(name: str) -> Judge:
    """The judge of one teacher-forced check."""

    def judge(evidence: Evidence, terms: Terms) -> Found:
        scores, null = [arrays_of(c) for c in evidence.chunks], [arrays_of(c) for c in evidence.null]
        return judge_tokens(name, scores, null, _own_loss(evidence, null), terms)

    return judge


def judge_tokens(
    name: str,
    scores: Sequence[TokenScores],
    null: Sequence[TokenScores],
    own_loss: statistics.OwnLoss,
    terms: Terms,
) -> Found:
    """One teacher-forced check over all chunks.

    Args:
        name: ``perplexity_ratio``, ``mean_kld``, ``tail_kld``, ``top1_agreement`` or ``null_ratio``.
        scores: candidate against baseline, by chunk.
        null: PyTorch against itself over the first chunks.
        own_loss: see :data:`bench.gate.statistics.OwnLoss`; asked for further chunks where it matters.
        terms: margins and mode.
    """
    tier, mode = terms.tier, terms.mode
    if why := not_applicable(name, terms):
        return Found("SKIPPED", why)
    if not scores:
        return Found("SKIPPED", NO_PROSE)
    if name == "perplexity_ratio":
        found = statistics.perplexity_ratio(scores, null, tier, SEED)
    elif name == "mean_kld":
        found = statistics.mean_kld(scores, null, tier, SEED)
    elif name == "tail_kld":
        found = statistics.tail_kld(scores, null, tier, own_loss if terms.short_floats else None)
    elif name == "top1_agreement":
        asked = own_loss if terms.short_floats and mode.judges_tails else None
        found = statistics.top1_agreement(scores, null, tier, SEED, asked)
    else:
        found = statistics.null_ratio(scores[: len(null)], null, SEED)
    if found.status == "PASS" and len(scores) < LEAST_CHUNKS and name in ("perplexity_ratio", "mean_kld"):
        detail = f"one chunk of text has no spread to bound; {LEAST_CHUNKS} or more decide"
        found = found.model_copy(update={"status": "INCONCLUSIVE", "detail": detail})
    tails = found.status != "FAIL" and name in ("tail_kld", "top1_agreement")
    told = found.status in ("FAIL", "INCONCLUSIVE") and (mode.judges_tails or not tails)
    if not mode.judges_tails and (found.status == "INCONCLUSIVE" or tails):
        found = found.model_copy(update={"status": "REPORTED"})
    line = f"{found.value:.6g}"
    line += f", bound {found.bound:.4g}" if found.bound is not None else ""
    line += f", limit {found.limit:g}" if found.limit is not None else ""
    line += f", null {found.null_value:.3g}" if found.null_value is not None else ""
    if told:
        line += f" ({found.detail})"
    return Found(found.status, line, measurements=[found])


# -- behaviour at places ---------------------------------------------------------------------------------------------


def places(name: str, title: str, detail: str) -> Judge:
    """The judge of a check that takes the largest of several KL divergences.

    Args:
        name: of the check.
        title: of its measurement.
        detail: what was compared, in a few words.
    """

    def judge(evidence: Evidence, terms: Terms) -> Found:
        if why := not_applicable(name, terms):
            return Found("SKIPPED", why)
        rows, limit = evidence.places.get(name, []), terms.tail_limit
        if not rows:
            return Found("SKIPPED", TOO_SHORT)
        top = max(rows, key=lambda r: r.kld if np.isfinite(r.kld) else np.inf)
        good = bool(np.isfinite(top.kld) and top.kld <= limit)
        m = Measurement(
            name=name,
            title=title,
            status="PASS" if good else "FAIL",
            value=max(top.kld, 0.0),
            bound=None,
            limit=limit,
            better="lower",
            null_value=None,
            samples=len(rows),
            unit="nats",
            detail=f"{detail}; largest at {top.place}",
        )
        findings = [] if good else [Finding(where=top.place, what=f"KL divergence {top.kld:.3g} nats, limit {limit:g}")]
        line = f"{top.kld:.3g} nats at {top.place}, limit {limit:g} ({len(rows)} places)"
        return Found(m.status, line, findings=findings, measurements=[m])

    return judge


# -- generations -----------------------------------------------------------------------------------------------------


def _outputs(
    title: str, better: Literal["higher", "equal"]
) -> Callable[[Callable[[Sequence[GeneratedItem], Terms], Decision]], Judge]:
    """The judge of generations that a function decides."""

    def judge(look: Callable[[Sequence[GeneratedItem], Terms], Decision]) -> Judge:
        @wraps(look)
        def judged(evidence: Evidence, terms: Terms) -> Found:
            if not evidence.outputs:
                return Found("SKIPPED", NO_ITEMS)
            good, value, limit, detail = look(evidence.outputs, terms)
            m = Measurement(
                name=look.__name__,
                title=title,
                status="PASS" if good else "FAIL",
                value=value,
                bound=None,
                limit=limit,
                better=better,
                null_value=None,
                samples=len(evidence.outputs),
                unit="",
                detail=detail,
            )
            return Found(m.status, f"{value:.4g} ({detail})", measurements=[m])

        return judged

    return judge


@_outputs("Equal greedy generations", "higher")
def greedy(made: Sequence[GeneratedItem], terms: Terms) -> Decision:
    """Share of greedy generations equal token for token, and where the first one diverges."""
    differ = [o for o in made if not o.candidate == o.baseline == o.equal]
    share = 1 - len(differ) / len(made)
    detail = f"{len(made) - len(differ)} of {len(made)} generations equal token for token"
    if differ:
        first = [o.equal for o in differ]
        detail += f"; first divergence at token {min(first) + 1} (median {int(np.median(first)) + 1})"
    return share >= terms.tier.greedy, share, terms.tier.greedy, detail


@_outputs("Length of the outputs", "equal")
def length_band(made: Sequence[GeneratedItem], terms: Terms) -> Decision:
    """Length of the outputs over the baseline's, 0.9 to 1.1 both ways."""
    ratio = sum(o.candidate for o in made) / max(1, sum(o.baseline for o in made))
    detail = f"tokens of the candidate over the baseline's, allowed {LENGTH_BAND[0]} to {LENGTH_BAND[1]}"
    return LENGTH_BAND[0] <= ratio <= LENGTH_BAND[1], ratio, 1.0, detail


@_outputs("Generations that end by themselves", "equal")
def end_token(made: Sequence[GeneratedItem], terms: Terms) -> Decision:
    """As many generations end by themselves as the baseline's do."""
    ours, theirs = sum(o.candidate_ended for o in made), sum(o.baseline_ended for o in made)
    # Rounding flips a few tokens in lossy tiers: as many generations may end otherwise as may differ at all.
    allowed = max(1, round((1 - terms.tier.greedy) * len(made)))
    detail = f"{ours} of {len(made)} end with an end token, the baseline's {theirs}; {allowed} may differ"
    return abs(ours - theirs) <= allowed, float(ours), float(theirs), detail


# -- task metrics ----------------------------------------------------------------------------------------------------


def tasks(evidence: Evidence, terms: Terms) -> Found:
    """BLEU, ROUGE, exact match and F1 against the references and against the baseline's own outputs."""
    if not evidence.tasks:
        return Found("SKIPPED", NO_ITEMS)
    metrics = [task_metric(e, terms.tier) for e in evidence.tasks]
    status = worst([m.status for m in metrics])
    if status == "INCONCLUSIVE" and not terms.mode.judges_tails:
        status = "REPORTED"
    return Found(status, _tasks_line(metrics), tasks=metrics)


def task_metric(e: TaskEvidence, tier: Tier) -> TaskMetric:
    """One metric: non-inferior to the baseline's score, by a paired bootstrap over items.

    Where the baseline itself cannot do the task, 0.1 % of a score near 0 is a margin of nothing, and the score is
    noise: what can be asked is whether the candidate says what the baseline says, as often as greedy tokens have to
    agree.
    """
    candidate, baseline, cross = (
        Scored(e.metric, np.asarray(values, np.float64), e.settings) for values in (e.candidate, e.baseline, e.cross)
    )
    low, high = difference_interval(candidate, baseline, SEED)
    limit = -(1.0 - tier.task_ratio) * baseline.score
    items = told = len(e.items)
    settings = e.settings
    if e.same_outputs or baseline.score >= FLOOR_SCORE:
        judged = (candidate.score - baseline.score, low, high, limit - 1e-12)
        told = int((candidate.statistics != baseline.statistics).reshape(items, -1).any(1).sum())
    else:
        judged = (cross.score, *score_interval(cross, SEED), 100.0 * tier.greedy - 1e-9)
        settings += (
            f"; the baseline scores {baseline.score:.1f} only, judged by the candidate's score against the baseline's "
            f"outputs, at least {100 * tier.greedy:.0f}"
        )
    return TaskMetric(
        task=e.group,
        metric=e.metric,
        candidate=candidate.score,
        baseline=baseline.score,
        candidate_vs_baseline=cross.score,
        difference_bound=low,
        limit=limit,
        status=task_status(*judged[1:], told, tier),
        items=items,
        settings=settings,
        items_needed=items_needed(*judged, items, told),
    )


def task_status(low: float, high: float, limit: float, told: int, tier: Tier) -> Status:
    """Status of one task metric from the bounds of its difference.

    A bootstrap over a handful of items proves no defect, however many others score the same on both sides: ``told``
    counts those that do not. And where rounding flips a few greedy tokens, as it does in
    every tier but fp32, 0.1 % of a task score would take thousands of items to show: then the score is reported, and
    the teacher-forced checks decide.
    """
    status = decide(low, high, limit, "higher")
    if status == "FAIL" and told < LEAST_ITEMS:
        status = "INCONCLUSIVE"
    return "REPORTED" if status == "INCONCLUSIVE" and tier.name != "fp32" else status


def items_needed(
    value: float, low: float, high: float, limit: float, items: int, told: int | None = None
) -> int | None:
    """Items that would decide a score that has to be at least ``limit``; None where these did, 0 where none would.

    The bound's distance from the score shrinks with the root of the number of items (:func:`chunks_needed`). ``told``:
    how many of them score otherwise than the baseline's; None: all.
    """
    told = items if told is None else told
    if low >= limit or (high < limit and told >= LEAST_ITEMS):
        return None
    if high < limit:
        return math.ceil(items * LEAST_ITEMS / told) if told else 0
    need = chunks_needed(value, low if value > limit else high, limit, items)
    return max(need, LEAST_ITEMS) if need else 0


def _tasks_line(metrics: Sequence[TaskMetric]) -> str:
    """The score that decides the status: one that failed, the undecided one that needs most, or the largest loss."""
    bad = [m for m in metrics if m.status == "FAIL"]
    undecided = sorted((m for m in metrics if m.status == "INCONCLUSIVE"), key=lambda m: -(m.items_needed or 0))
    shown = (bad or undecided or [min(metrics, key=lambda m: m.candidate - m.baseline)])[0]
    what = "undecided" if undecided and not bad else "largest loss"
    needs = f"; {shown.would_decide}" if shown.would_decide else ""
    count = f"{len(undecided)} of {len(metrics)}" if what == "undecided" else f"{len(metrics)}"
    scores = f"{shown.candidate:.2f} against {shown.baseline:.2f}, {shown.items} items{needs}"
    loss = shown.baseline - shown.candidate
    return f"{count} scores {what}, {loss:.2f} points ({shown.metric} on {shown.task}: {scores})"
