"""The parity gate: is the candidate still the baseline's model?

Runs both sides on the same ids and texts and hands pure figures to :mod:`bench.gate.statistics` and
:mod:`bench.gate.metrics`. Besides teacher forcing it looks at what that misses: the decode graph against the scoring
graph, step-by-step decode against prefill, and every row of an uneven batch against the row alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.data.loading import Dataset
from bench.gate.generations import BATCH, Outputs, run_generation
from bench.gate.metrics import Scored, difference_interval, score_interval, score_task
from bench.gate.statistics import (
    TIERS,
    Tier,
    TokenFigures,
    chunks_needed,
    decide,
    explained_tail,
    teacher_forced_checks,
    token_figures,
)
from bench.latency.workload import Profile, chunked
from reports.record import Check, Example, Parity, Status, TaskMetric
from runtime.session import Logits, Session

Tick = Callable[[str], None]
LENGTH_BAND = (0.9, 1.1)
EXAMPLES_PER_TASK = 2
LEAST_ITEMS = 12
FLOOR_SCORE = 5.0
"""Below so many points of 100 the baseline itself cannot do a task: references say nothing about a candidate there."""


class Scores(Protocol):
    """What teacher forcing needs of a side; a session is one, a baseline with a cache another."""

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits ``[length, vocab]`` fp32."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Encode."""

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        """Decode."""


def score_windows(
    candidate: Scores, baseline: Scores, windows: Sequence[Sequence[int]], tick: Tick = lambda _: None
) -> list[TokenFigures]:
    """Teacher-forced comparison, one entry a window."""
    figures = []
    for k, ids in enumerate(windows):
        ours = candidate.score(ids).copy()
        figures.append(token_figures(ours, baseline.score(ids), ids))
        tick(f"scoring window {k + 1} of {len(windows)}")
    return figures


def consistency_check(candidate: Session, windows: Sequence[Sequence[int]], tier: Tier) -> list[Check]:
    """The candidate against itself: decode against scoring graph, steps against prefill, uneven batch against alone.

    KL divergence of next-token distributions, largest over the positions looked at, against the tier's tail margin.
    """
    window = list(windows[0])
    steps = min(24, len(window) // 2)
    start = len(window) - steps
    whole = candidate.score(window).copy()
    stepped = [candidate.prefill([window[:start]], reserve=steps)[0].copy()]
    stepped += [candidate.step([token])[0].copy() for token in window[start:-1]]
    by_steps = token_figures(
        np.stack([*stepped, whole[-1]]), np.stack([*whole[start - 1 : -1], whole[-1]]), [0] * (steps + 1)
    )
    rows = [window[:start], window[: max(2, start // 3)], window[: max(3, start // 2)], window[:2]]
    nexts = [window[len(r)] for r in rows]
    together = [candidate.prefill(rows, reserve=1).copy(), candidate.step(nexts).copy()]
    alone = [np.stack([whole[len(r) - 1] for r in rows]), np.stack([whole[len(r)] for r in rows])]
    by_rows = [
        token_figures(np.vstack([a, a[-1:]]), np.vstack([b, b[-1:]]), [0] * (len(rows) + 1))
        for a, b in zip(together, alone, strict=True)
    ]

    limit = TIERS["int8"].tail_kld if tier.tail_kld is None else tier.tail_kld
    assert limit is not None

    def check(name: str, title: str, kld: float, samples: int, detail: str) -> Check:
        return Check(
            name=name,
            title=title,
            status="PASS" if kld <= limit else "FAIL",
            value=max(kld, 0.0),
            bound=None,
            limit=limit,
            better="lower",
            null_value=None,
            samples=samples,
            unit="nats",
            detail=detail,
        )

    return [
        check(
            "decode_consistency",
            "Step-by-step decode",
            float(by_steps.kld.max()),
            steps,
            f"largest KL divergence of {steps} decode steps over the KV cache against one scoring pass",
        ),
        check(
            "batch_consistency",
            "Uneven batch",
            float(max(f.kld.max() for f in by_rows)),
            2 * len(rows),
            f"largest KL divergence of rows of {', '.join(str(len(r)) for r in rows)} tokens in one batch, "
            f"prefill and one step, against each row alone",
        ),
    ]


def greedy_checks(outputs: Sequence[Outputs], tier: Tier) -> list[Check]:
    """Share of items with equal tokens, place of the first divergence, and the two-sided length band."""
    equal = [o.candidate == o.baseline for o in outputs]
    first = [
        next(
            (k for k, (a, b) in enumerate(zip(o.candidate, o.baseline, strict=False)) if a != b),
            min(len(o.candidate), len(o.baseline)),
        )
        for o, same in zip(outputs, equal, strict=True)
        if not same
    ]
    detail = f"{sum(equal)} of {len(equal)} generations equal token for token"
    if first:
        detail += f"; first divergence at token {min(first) + 1} (median {int(np.median(first)) + 1})"
    lengths = [sum(len(o.candidate) for o in outputs), sum(len(o.baseline) for o in outputs)]
    ratio = lengths[0] / max(1, lengths[1])
    share = sum(equal) / len(equal)
    return [
        Check(
            name="greedy_tokens",
            title="Equal greedy generations",
            status="PASS" if share >= tier.greedy else "FAIL",
            value=share,
            bound=None,
            limit=tier.greedy,
            better="higher",
            null_value=None,
            samples=len(outputs),
            unit="",
            detail=detail,
        ),
        Check(
            name="length_band",
            title="Length of the outputs",
            status="PASS" if LENGTH_BAND[0] <= ratio <= LENGTH_BAND[1] else "FAIL",
            value=ratio,
            bound=None,
            limit=1.0,
            better="equal",
            null_value=None,
            samples=len(outputs),
            unit="",
            detail=f"tokens of the candidate over the baseline's, allowed {LENGTH_BAND[0]} to {LENGTH_BAND[1]}",
        ),
    ]


def task_metrics(outputs: Sequence[Outputs], tokenizer: Any, tier: Tier, seed: int) -> list[TaskMetric]:
    """BLEU, ROUGE, exact match and F1 of both sides against the references, and of one against the other."""
    rows: list[TaskMetric] = []
    for group, members in itertools.groupby(sorted(outputs, key=lambda o: o.item.group), key=lambda o: o.item.group):
        chosen = list(members)
        task = chosen[0].item.task
        ours = [_text(o.candidate, tokenizer, task) for o in chosen]
        theirs = [_text(o.baseline, tokenizer, task) for o in chosen]
        references = [o.item.references for o in chosen]
        against_baseline = score_task(task, ours, [[t] for t in theirs])
        pairs = zip(
            score_task(task, ours, references),
            score_task(task, theirs, references),
            against_baseline,
            strict=True,
        )
        for candidate, baseline, cross in pairs:
            rows.append(_task_metric(group, candidate, baseline, cross, tier, seed, ours == theirs))
    return rows


def task_status(low: float, high: float, limit: float, items: int, tier: Tier) -> Status:
    """Status of one task metric from the bounds of its difference.

    A bootstrap over a handful of items proves no defect. And where rounding flips a few greedy tokens, as it does in
    every tier but fp32, 0.1 % of a task score would take thousands of items to show: then the figure is reported, and
    the teacher-forced checks decide.
    """
    status = decide(low, high, limit, "higher")
    if status == "FAIL" and items < LEAST_ITEMS:
        status = "INCONCLUSIVE"
    return "REPORTED" if status == "INCONCLUSIVE" and tier.name != "fp32" else status


def items_needed(value: float, low: float, high: float, limit: float, items: int) -> int | None:
    """Items that would decide a score that has to be at least ``limit``; None where these did, 0 where none would.

    The bound's distance from the score shrinks with the root of the number of items (:func:`chunks_needed`).
    """
    if low >= limit or (high < limit and items >= LEAST_ITEMS):
        return None
    if high < limit:
        return LEAST_ITEMS
    need = chunks_needed(value, low if value > limit else high, limit, items)
    return max(need, LEAST_ITEMS) if need else 0


def _task_metric(
    group: str, candidate: Scored, baseline: Scored, cross: Scored, tier: Tier, seed: int, same: bool
) -> TaskMetric:
    low, high = difference_interval(candidate, baseline, seed)
    limit = -(1.0 - tier.task_ratio) * baseline.score
    items = len(candidate.statistics)
    settings = candidate.settings
    if same or baseline.score >= FLOOR_SCORE:
        judged = (candidate.score - baseline.score, low, high, limit - 1e-12)
    else:
        # 0.1 % of a score near 0 is a margin of nothing, and the score itself is noise: what can be asked is whether
        # the candidate says what the baseline says, as often as greedy tokens have to agree.
        judged = (cross.score, *score_interval(cross, seed), 100.0 * tier.greedy - 1e-9)
        settings += (
            f"; the baseline scores {baseline.score:.1f} only, judged by the candidate's score against the baseline's "
            f"outputs, at least {100 * tier.greedy:.0f}"
        )
    return TaskMetric(
        task=group,
        metric=candidate.metric,
        candidate=candidate.score,
        baseline=baseline.score,
        candidate_vs_baseline=cross.score,
        difference_bound=low,
        limit=limit,
        status=task_status(*judged[1:], items, tier),
        items=items,
        settings=settings,
        items_needed=items_needed(*judged, items),
    )


def _text(ids: Sequence[int], tokenizer: Any, task: str) -> str:
    """Generated text; an answer ends with its line, behind it a completed text goes on with the next question."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
    return text.split("\n")[0].strip() if task == "qa" else text


def examples(outputs: Sequence[Outputs], tokenizer: Any) -> list[Example]:
    """A few pairs of each group, differing ones first."""
    chosen: list[Example] = []
    for _, members in itertools.groupby(sorted(outputs, key=lambda o: o.item.group), key=lambda o: o.item.group):
        ordered = sorted(members, key=lambda o: o.candidate == o.baseline)
        chosen += [
            Example(
                task=o.item.group,
                item=o.item.id,
                prompt=o.item.instruction,
                reference=o.item.references[0],
                candidate=_text(o.candidate, tokenizer, o.item.task),
                baseline=_text(o.baseline, tokenizer, o.item.task),
            )
            for o in ordered[:EXAMPLES_PER_TASK]
        ]
    return chosen


def text_windows(dataset: Dataset, tokenizer: Any, profile: Profile) -> list[list[int]]:
    """Token windows of the dataset's prose, at most ``profile.windows``."""
    windows = [w for text in dataset.prose() for w in chunked(tokenizer(text)["input_ids"], profile.window)]
    return windows[: profile.windows] if profile.windows else windows


@dataclass
class GateInputs:
    """What the gate needs; ``null`` opens the baseline with another attention kernel (None: no null control)."""

    candidate: Session
    baseline: Session
    null: Callable[[], Session] | None
    tokenizer: Any
    eos: Sequence[int]
    dataset: Dataset
    profile: Profile
    tier: Tier
    seed: int


def _teacher_forced(
    inputs: GateInputs, windows: Sequence[Sequence[int]], figures: Sequence[TokenFigures], tick: Tick
) -> list[Check]:
    """The statistics beside their null control; in fp16 and bf16 also against what PyTorch itself loses there."""
    tier, baseline = inputs.tier, inputs.baseline
    if not inputs.null:
        return teacher_forced_checks(figures, [], tier, inputs.seed)
    other = inputs.null()
    null = score_windows(other, baseline, windows[: inputs.profile.null_windows], tick)
    checks = teacher_forced_checks(figures, null, tier, inputs.seed)
    if tier.name in ("fp16", "bf16") and tier.tail_kld is not None:

        def own_loss(k: int) -> NDArray[np.float64]:
            return null[k].kld if k < len(null) else score_windows(other, baseline, [windows[k]])[0].kld

        tail = next(k for k, c in enumerate(checks) if c.name == "tail_kld")
        checks[tail] = explained_tail(checks[tail], figures, own_loss, tier.tail_kld)
    other.close()
    return checks


def run_gate(inputs: GateInputs, tick: Tick = lambda _: None) -> Parity:
    """Everything, in order; the result goes into the record.

    Raises:
        DatasetError: an item that does not fit the context.
    """
    profile, tier = inputs.profile, inputs.tier
    checks: list[Check] = []
    windows = text_windows(inputs.dataset, inputs.tokenizer, profile)
    if windows:
        checks += consistency_check(inputs.candidate, windows, tier)
        tick("consistency of the candidate with itself")
        figures = score_windows(inputs.candidate, inputs.baseline, windows, tick)
        checks = _teacher_forced(inputs, windows, figures, tick) + checks
    groups = inputs.dataset.groups(profile.items)
    items = [item for members in groups.values() for item in members]
    tasks: list[TaskMetric] = []
    shown: list[Example] = []
    if items:
        outputs = run_generation(inputs.candidate, inputs.baseline, items, inputs.tokenizer, inputs.eos, tick)
        checks += greedy_checks(outputs, tier)
        tasks = task_metrics(outputs, inputs.tokenizer, tier, inputs.seed)
        shown = examples(outputs, inputs.tokenizer)
    return Parity(
        tier=tier.name,
        baseline=inputs.baseline.info.label,
        dataset=f"{inputs.dataset.name} (SHA-256 {inputs.dataset.sha256[:16]})",
        checks=checks,
        tasks=tasks,
        examples=shown,
    )


def ticks_of(dataset: Dataset, windows: int, profile: Profile) -> int:
    """How many times :func:`run_gate` will tick, for a progress bar."""
    counts: dict[str, int] = {}
    for members in dataset.groups(profile.items).values():
        for item in members:
            counts[item.task] = counts.get(item.task, 0) + 1
    batches = sum(-(-n // BATCH) for n in counts.values())
    return (windows + min(windows, profile.null_windows) + 1 if windows else 0) + batches
