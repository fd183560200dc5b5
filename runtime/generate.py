"""The one generation loop: yields tokens with their time stamps; every metric is derived from those.

``TTFT`` is the time from the call to the first token (prefill and its argmax); N tokens have N - 1 decode gaps,
``TPOT`` is their mean. A row that has ended leaves the batch and costs nothing any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SessionError
from runtime.sampling import GREEDY, Chooser, Draws, Sampling
from runtime.session import Ids, Session
from runtime.text import TextStream

EOS, STOP_ID, STOP_STRING, LENGTH = "eos", "stop_id", "stop_string", "length"
"""Why a row ended: the model's end token, an id or a string that the caller named, the limit."""
Ends = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]


@dataclass(frozen=True)
class Step:
    """One token for each row that is still running, and when it was known: seconds since the call.

    ``rows`` holds the place of each token's row in the batch that was asked for.
    """

    tokens: NDArray[np.int64]
    at_s: float
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Generation:
    """What came out of one batch.

    ``tokens`` holds each row's new tokens (the end token included when it came); ``at_s`` the time stamp of each
    step, seconds since the call; ``ended`` whether the row ended by itself; ``reasons`` why (:data:`EOS`, ...);
    ``texts`` the rows' text, cut before a stop string, where a tokenizer was given.
    """

    tokens: tuple[tuple[int, ...], ...]
    at_s: tuple[float, ...]
    ended: tuple[bool, ...]
    reasons: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.at_s[0]

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
    sampling: Sampling = GREEDY,
    ends: Ends | None = None,
    compact: bool = True,
) -> Iterator[Step]:
    """One :class:`Step` per token position, until every row has ended or the limit is reached.

    Args:
        session: what runs; a batch that it holds is given up.
        ids: one prompt a row.
        max_new_tokens: limit for every row.
        eos: tokens that end their row.
        clock: seconds.
        sampling: how tokens are chosen.
        ends: asked after each step, with the rows and their tokens, which of them end here.
        compact: rows that have ended leave the session's batch (where it can do that); else they keep
            decoding and their tokens are discarded.

    Raises:
        ContextOverflowError: longest prompt + ``max_new_tokens`` exceeds the context; nothing has run.
    """
    if max_new_tokens < 1:
        raise SessionError(f"cannot generate {max_new_tokens} tokens; ask for at least 1")
    start = clock()
    # What a row has seen is known on the host only.
    on_device = sampling.repetition_penalty == 1 and getattr(session, "choose_on_device", False)
    advance = (_OnDevice if on_device else _OnHost)(session, ids, max_new_tokens, sampling)
    keep = getattr(session, "keep", None) if compact else None
    rows = np.arange(len(ids))
    fed: NDArray[np.int64] | None = None  # what the session's batch is given, ended rows included
    live = rows  # places in that batch of the rows that are still running
    for n in range(max_new_tokens):
        tokens = advance(fed, live)
        yield Step(tokens, clock() - start, rows)
        if n + 1 == max_new_tokens:
            return
        if fed is None or len(live) == len(fed):
            fed = tokens
        else:
            fed[live] = tokens
        if not eos and ends is None:
            continue
        done = np.isin(tokens, eos) if eos else np.zeros(len(tokens), bool)
        if ends is not None:
            done = done | ends(rows, tokens)
        if not done.any():
            continue
        going = np.flatnonzero(~done)
        if not going.size:
            return
        rows = rows[going]
        advance.keep(going)
        if keep is not None:
            keep(going.tolist())
            fed, live = fed[going], np.arange(len(going))
        else:
            fed, live = fed.copy(), live[going]


class _OnHost:
    """Logits come to the host, the token is chosen here."""

    def __init__(self, session: Session, ids: Ids, reserve: int, sampling: Sampling) -> None:
        self._session, self._ids, self._reserve = session, ids, reserve
        self._choose = Chooser(sampling, ids, session.info.vocab_size)

    def __call__(self, fed: NDArray[np.int64] | None, live: NDArray[np.int64]) -> NDArray[np.int64]:
        session = self._session
        logits = session.prefill(self._ids, reserve=self._reserve) if fed is None else session.step(fed.tolist())
        return self._choose(logits if len(live) == len(logits) else logits[live])

    def keep(self, rows: NDArray[np.int64]) -> None:
        self._choose.keep(rows)


class _OnDevice:
    """The session chooses where the logits are: one id a row crosses, the next step reads it in place."""

    def __init__(self, session: Any, ids: Ids, reserve: int, sampling: Sampling) -> None:
        self._session, self._ids, self._reserve, self._sampling = session, ids, reserve, sampling
        self._draws = None if sampling.greedy else Draws(sampling.seeded(), len(ids))

    def __call__(self, fed: NDArray[np.int64] | None, live: NDArray[np.int64]) -> NDArray[np.int64]:
        session = self._session
        numbers: NDArray[np.float64] | None = None
        if self._draws is not None:
            numbers = np.zeros(len(self._ids) if fed is None else len(fed))
            numbers[live] = self._draws()  # finished rows draw nothing
        tokens: NDArray[np.int64] = (
            session.prefill_token(self._ids, self._reserve, self._sampling, numbers)
            if fed is None
            else session.step_token(numbers)
        )
        return tokens if len(live) == len(tokens) else tokens[live]

    def keep(self, rows: NDArray[np.int64]) -> None:
        if self._draws is not None:
            self._draws.keep(rows)


def generate(
    session: Session,
    ids: Ids,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> Generation:
    """Run :func:`stream` to its end and collect it; rows are cut after their end token.

    Args:
        session, ids, max_new_tokens, eos, sampling: see :func:`stream`.
        stop_ids: tokens that end their row besides ``eos``.
        stop_strings: texts that end their row; they need the ``tokenizer``.
        tokenizer: when given, ``texts`` is filled.

    Raises:
        SessionError: stop strings without a tokenizer; see :func:`stream`.
    """
    if stop_strings and tokenizer is None:
        raise SessionError("stop strings need the tokenizer; pass tokenizer=runtime.text.load_tokenizer(folder)")
    silent = (*eos, *stop_ids)
    texts = [TextStream(tokenizer, stop_strings, silent, row) for row in ids] if tokenizer is not None else []
    pieces = [""] * len(ids)

    def ends(rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            pieces[row] += texts[row].push(token)
        return np.array([texts[row].stopped for row in rows.tolist()])

    found: list[list[int]] = [[] for _ in ids]
    at = []
    for step in stream(
        session, ids, max_new_tokens, (*eos, *stop_ids), sampling=sampling, ends=ends if stop_strings else None
    ):
        at.append(step.at_s)
        for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
            found[row].append(token)
    for row, text in enumerate(texts):
        for token in found[row][text.pushed :]:  # the last step, or all of them where there was no stop string
            pieces[row] += text.push(token)
        pieces[row] += text.finish()
    reasons = [
        EOS
        if row[-1] in eos
        else STOP_ID
        if row[-1] in stop_ids
        else STOP_STRING
        if texts and texts[n].stopped
        else LENGTH
        for n, row in enumerate(found)
    ]
    return Generation(
        tuple(tuple(row) for row in found),
        tuple(at),
        tuple(reason != LENGTH for reason in reasons),
        tuple(reasons),
        tuple(pieces) if texts else (),
    )
