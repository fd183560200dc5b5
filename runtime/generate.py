"""The one generation loop: yields tokens with their time stamps; every figure is derived from those.

``TTFT`` is the time from the call to the first token (prefill and its argmax); N tokens have N - 1 decode gaps,
``TPOT`` is their mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SessionError
from runtime.session import Ids, Session


@dataclass(frozen=True)
class Step:
    """One token per row, and when it was known: seconds since the call."""

    tokens: NDArray[np.int64]
    at_s: float


@dataclass(frozen=True)
class Generation:
    """What came out of one batch.

    ``tokens`` holds each row's new tokens (the end token included when it came); ``at_s`` the time stamp of each
    step, seconds since the call; ``ended`` whether the row ended by itself.
    """

    tokens: tuple[tuple[int, ...], ...]
    at_s: tuple[float, ...]
    ended: tuple[bool, ...]

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.at_s[0]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between tokens: N - 1 for N tokens."""
        return tuple(b - a for a, b in zip(self.at_s, self.at_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, None for a single token."""
        return (self.at_s[-1] - self.at_s[0]) / (len(self.at_s) - 1) if len(self.at_s) > 1 else None

    @property
    def total_s(self) -> float:
        """End-to-end time."""
        return self.at_s[-1]


def stream(
    session: Session,
    ids: Ids,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Step]:
    """Greedy generation, one :class:`Step` per token position, until every row has ended or the limit is reached.

    Rows that have ended go on with their end token so that the batch stays whole; their later tokens mean nothing.

    Raises:
        ContextOverflowError: longest prompt + ``max_new_tokens`` exceeds the context; nothing has run.
    """
    if max_new_tokens < 1:
        raise SessionError(f"cannot generate {max_new_tokens} tokens; ask for at least 1")
    start = clock()
    logits = session.prefill(ids, reserve=max_new_tokens)
    ended = np.zeros(len(ids), bool)
    tokens: NDArray[np.int64] = np.zeros(len(ids), np.int64)
    for n in range(max_new_tokens):
        if n:
            logits = session.step(tokens.tolist())
        chosen = logits.argmax(axis=-1).astype(np.int64)
        tokens = chosen if n == 0 else np.where(ended, tokens, chosen).astype(np.int64)
        yield Step(tokens, clock() - start)
        if eos:
            ended |= np.isin(tokens, eos)
            if ended.all():
                return


def generate(session: Session, ids: Ids, max_new_tokens: int, eos: Sequence[int] = ()) -> Generation:
    """Run :func:`stream` to its end and collect it; rows are cut behind their end token."""
    steps = list(stream(session, ids, max_new_tokens, eos))
    grid = np.stack([s.tokens for s in steps], axis=1)
    rows, ended = [], []
    for row in grid:
        hits = np.flatnonzero(np.isin(row, eos)) if eos else np.zeros(0, int)
        ended.append(bool(hits.size))
        rows.append(tuple(int(t) for t in (row[: hits[0] + 1] if hits.size else row)))
    return Generation(tuple(rows), tuple(s.at_s for s in steps), tuple(ended))
