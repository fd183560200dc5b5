"""Greedy generations of both sides, in batches that are the same whoever computes them.

A batch's rows influence one another's rounding, so batches are fixed by the items alone: not by workers, not by what a
run that was stopped had finished. Try: ``llama-onnx validate FOLDER --baseline demo --only greedy``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.data.items import NEW_TOKENS, Item, prompt_ids
from bench.gate.found import first_difference
from bench.gate.metrics import score_task
from reports.validation import Example, GeneratedItem, TaskEvidence

BATCH = 8
EXAMPLES_PER_TASK = 2


@dataclass(frozen=True)
class Outputs:
    """Generated ids of one item on both sides."""

    item: Item
    candidate: tuple[int, ...]
    baseline: tuple[int, ...]


@dataclass(frozen=True)
class PromptBatch:
    """Items of one task that are generated together, and how many new tokens each may have."""

    items: tuple[Item, ...]
    prompts: tuple[tuple[int, ...], ...]
    limit: int


def batches_of(items: Sequence[Item], tokenizer: Any, context: int, most: int | None = None) -> list[PromptBatch]:
    """Batches of similar length within a task, so that little is spent on padding; ``most`` caps the new tokens.

    Items that are longer than the context leaves for a prompt are left out.
    """
    encoded = ((item, tuple(prompt_ids(item, tokenizer))) for item in items)
    fitting = [(item, ids) for item, ids in encoded if len(ids) <= context - NEW_TOKENS[item.task]]
    out = []
    ordered = sorted(fitting, key=lambda pair: (pair[0].task, len(pair[1])))
    for task, group in itertools.groupby(ordered, key=lambda pair: pair[0].task):
        limit = min(NEW_TOKENS[task], most or NEW_TOKENS[task])
        whole = list(group)
        for k in range(0, len(whole), BATCH):
            members = whole[k : k + BATCH]
            out.append(PromptBatch(tuple(i for i, _ in members), tuple(ids for _, ids in members), limit))
    return out


def outputs_in_order(
    items: Sequence[Item],
    batches: Sequence[PromptBatch],
    made: Sequence[tuple[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]]],
) -> list[Outputs]:
    """Tokens of (candidate, baseline) of each batch -> one entry an item, in the items' order."""
    found = {
        item.id: Outputs(item, a, b)
        for batch, (ours, theirs) in zip(batches, made, strict=True)
        for item, a, b in zip(batch.items, ours, theirs, strict=True)
    }
    return [found[item.id] for item in items]


def generated_items(outputs: Sequence[Outputs], eos: Sequence[int]) -> list[GeneratedItem]:
    """What the checks of generations need to know of each; ``eos`` are the baseline's end tokens."""
    ends = set(eos)
    return [
        GeneratedItem(
            item=o.item.id,
            group=o.item.group,
            candidate=len(o.candidate),
            baseline=len(o.baseline),
            equal=first_difference(o.candidate, o.baseline),
            candidate_ended=bool(o.candidate) and o.candidate[-1] in ends,
            baseline_ended=bool(o.baseline) and o.baseline[-1] in ends,
        )
        for o in outputs
    ]


def _groups(outputs: Sequence[Outputs]) -> list[tuple[str, list[Outputs]]]:
    ordered = sorted(outputs, key=lambda o: o.item.group)
    return [(group, list(members)) for group, members in itertools.groupby(ordered, key=lambda o: o.item.group)]


def task_evidence(outputs: Sequence[Outputs], tokenizer: Any) -> list[TaskEvidence]:
    """Per-item statistics of every metric: both sides against the references, and one against the other."""
    rows: list[TaskEvidence] = []
    for group, chosen in _groups(outputs):
        task = chosen[0].item.task
        ours = [_text(o.candidate, tokenizer, task) for o in chosen]
        theirs = [_text(o.baseline, tokenizer, task) for o in chosen]
        references = [o.item.references for o in chosen]
        pairs = ((ours, references), (theirs, references), (ours, [[t] for t in theirs]))
        scored = (score_task(task, outputs, wanted) for outputs, wanted in pairs)
        rows += [
            TaskEvidence(
                group=group,
                metric=candidate.metric,
                settings=candidate.settings,
                items=[o.item.id for o in chosen],
                candidate=candidate.statistics.tolist(),
                baseline=baseline.statistics.tolist(),
                cross=cross.statistics.tolist(),
                same_outputs=ours == theirs,
            )
            for candidate, baseline, cross in zip(*scored, strict=True)
        ]
    return rows


def _text(ids: Sequence[int], tokenizer: Any, task: str) -> str:
    """Generated text; an answer ends with its line, after it a completed text goes on with the next question."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
    return text.split("\n")[0].strip() if task == "qa" else text


def examples(outputs: Sequence[Outputs], tokenizer: Any) -> list[Example]:
    """A few pairs of each group, differing ones first."""
    return [
        Example(
            task=group,
            item=o.item.id,
            prompt=o.item.instruction,
            reference=o.item.references[0],
            candidate=_text(o.candidate, tokenizer, o.item.task),
            baseline=_text(o.baseline, tokenizer, o.item.task),
        )
        for group, members in _groups(outputs)
        for o in sorted(members, key=lambda o: o.candidate == o.baseline)[:EXAMPLES_PER_TASK]
    ]
