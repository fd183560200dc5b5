"""The one protocol behind which ONNX Runtime and the PyTorch baseline stand.

A session holds one batch at a time: :meth:`Session.prefill` starts it, :meth:`Session.step` appends one token per
row. Rows may be of uneven length; padding is the session's business and never the caller's. A session belongs to one
thread at a time: a call that comes while another one is under way is refused (:mod:`runtime.turns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ContextOverflowError, SessionError

Logits = NDArray[np.float32]
Ids = Sequence[Sequence[int]]


NOT_AS_ASKED = ("fallback", "partly_elsewhere")
"""Details that say why the session does not run, or not alone, on the provider that was asked for."""


@dataclass(frozen=True)
class SessionInfo:
    """What runs: for tables and records.

    ``runtime`` is ``onnxruntime`` or ``pytorch``; ``provider`` the execution provider (or device) that really runs;
    ``details`` holds settings worth recording (threads, attention kernel, options); ``cache_length`` is the capacity of
    the KV cache where the graph fixes it.
    """

    runtime: str
    provider: str
    precision: str
    context_length: int
    vocab_size: int
    details: dict[str, str | int | float | bool]
    cache_length: int | None = None

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have, prompt and answer."""
        return min(self.context_length, self.cache_length or self.context_length)

    @property
    def facts(self) -> dict[str, str | int | float | bool]:
        """Runtime, provider and details, as results hold them."""
        return {"runtime": self.runtime, "provider": self.provider, **self.details}


@runtime_checkable
class Session(Protocol):
    """One loaded model; those that can shrink their batch also have :meth:`runtime.ort_session.OrtSession.keep`."""

    @property
    def info(self) -> SessionInfo:
        """What runs."""

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start a batch.

        Args:
            ids: one prompt per row, token ids, lengths may differ, none empty.
            reserve: how many tokens :meth:`step` may append to each row.

        Returns:
            Logits of each row's last token, ``[batch, vocab]`` fp32, valid until the next call.

        Raises:
            ContextOverflowError: longest prompt + ``reserve`` exceeds the context; nothing has run.
            SessionError: no rows, an empty row, an id outside the vocabulary.
        """

    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token to each row; returns the logits after it, ``[batch, vocab]``, valid until the next call.

        Raises:
            ContextOverflowError: more steps than were reserved.
            SessionError: no batch was started, or not one id per row.
        """

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits at every position of one sequence, ``[length, vocab]`` fp32. Leaves no batch behind."""

    def close(self) -> None:
        """Free the model; closing twice is allowed."""


def check_rows(rows: Sequence[int], batch: int) -> None:
    """Refuse rows that a batch cannot be cut down to."""
    if batch == 0:
        raise SessionError("no batch is open; call prefill first")
    if not rows or rows[0] < 0 or rows[-1] >= batch or any(b <= a for a, b in pairwise(rows)):
        raise SessionError(f"cannot keep the rows {list(rows)} of a batch of {batch}; give some, ascending")


def check_prompts(ids: Ids, reserve: int, info: SessionInfo) -> list[int]:
    """Refuse what cannot run before anything runs; returns the rows' lengths.

    Raises:
        ContextOverflowError: too long for the context, or for a KV cache of fixed length.
        SessionError: no rows, an empty row, an id outside the vocabulary, a negative reserve.
    """
    lengths = [len(row) for row in ids]
    if not lengths:
        raise SessionError("no prompt given")
    if 0 in lengths:
        raise SessionError(f"prompt {lengths.index(0)} is empty; give at least one token")
    if reserve < 0:
        raise SessionError(f"cannot reserve {reserve} new tokens; ask for 0 or more")
    room = info.longest_row
    if max(lengths) + reserve > room:
        fixed = room < info.context_length
        raise ContextOverflowError(
            f"a prompt of {max(lengths)} tokens and {reserve} new ones exceed the "
            f"{f'KV cache of {room} slots' if fixed else f'context of {room}'}; shorten the prompt or ask for at most "
            f"{max(0, room - max(lengths))} new tokens"
            + (f", or export with a larger --cache-length (the context is {info.context_length})" if fixed else "")
        )
    for row in ids:
        low, high = min(row), max(row)
        if low < 0 or high >= info.vocab_size:
            bad = low if low < 0 else high
            raise SessionError(f"token id {bad} is outside the vocabulary of {info.vocab_size}; wrong tokenizer?")
    return lengths


def check_step(ids: Sequence[int], batch: int, used: int, capacity: int) -> None:
    """Refuse a step without a batch, of another width, or beyond what was reserved."""
    if batch == 0:
        raise SessionError("no batch is open; call prefill first")
    if len(ids) != batch:
        raise SessionError(f"{len(ids)} ids for a batch of {batch}; give one per row")
    if used >= capacity:
        raise ContextOverflowError(f"the reserved {capacity} positions are used up; prefill with a larger reserve")


def left_pad(ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As :func:`right_pad`, zeros before each row."""
    padded, mask = right_pad([row[::-1] for row in ids])
    return padded[:, ::-1].copy(), mask[:, ::-1].copy()


def right_pad(ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of uneven length -> (ids, mask), both ``[batch, longest]`` int64, zeros after each row."""
    width = max(len(row) for row in ids)
    out = np.zeros((len(ids), width), np.int64)
    mask = np.zeros((len(ids), width), np.int64)
    for i, row in enumerate(ids):
        out[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return out, mask
