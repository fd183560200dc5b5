"""Greedy generations of both sides, in batches that are the same whoever computes them.

A batch's rows influence one another's rounding, so batches are fixed by the items alone: not by workers, not by what a
run that was stopped had finished. Try: ``llama-onnx validate FOLDER --baseline demo --only greedy``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.data.loading import NEW_TOKENS, Item, prompt_ids
from bench.errors import DatasetError
from runtime.generate import generate
from runtime.session import Session

BATCH = 8


@dataclass(frozen=True)
class Outputs:
    """Generated ids of one item on both sides, and whether each ended by itself."""

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

    Raises:
        DatasetError: an item is longer than the context.
    """
    encoded = []
    for item in items:
        ids = tuple(prompt_ids(item, tokenizer))
        room = context - NEW_TOKENS[item.task]
        if len(ids) > room:
            raise DatasetError(
                f"item {item.id} has {len(ids)} tokens, the context of {context} leaves {room}; "
                f"shorten it or leave it out"
            )
        encoded.append((item, ids))
    out = []
    ordered = sorted(encoded, key=lambda pair: (pair[0].task, len(pair[1])))
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


def run_generation(
    candidate: Session,
    baseline: Session,
    items: Sequence[Item],
    tokenizer: Any,
    eos: Sequence[int],
    tick: Callable[[str], None] = lambda _: None,
) -> list[Outputs]:
    """Greedy generation of every item on both sides, same batches, in the items' order.

    Raises:
        DatasetError: an item is longer than the context.
    """
    batches = batches_of(items, tokenizer, candidate.info.context_length)
    made = []
    for k, batch in enumerate(batches):
        prompts = [list(p) for p in batch.prompts]
        made.append(tuple(generate(side, prompts, batch.limit, eos).tokens for side in (candidate, baseline)))
        tick(f"generating batch {k + 1} of {len(batches)} ({batch.items[0].task})")
    return outputs_in_order(items, batches, made)  # type: ignore[arg-type]
