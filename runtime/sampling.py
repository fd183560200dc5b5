"""Logits -> next tokens: greedy, or drawn with temperature, top-k, top-p and a repetition penalty.

The steps stand in the order in which transformers applies them: repetition penalty, temperature, top-k, top-p. Every
row draws from a generator of its own, so that what one row says does not depend on when the others ended.
Try: ``llama-onnx generate FOLDER "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1``.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SessionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 is greedy, everything else draws; ``top_k`` 0 and ``top_p`` 1 cut nothing off;
    ``repetition_penalty`` 1 changes nothing (above 1 makes tokens of the prompt and of the answer less likely, greedy
    included); ``seed`` None takes a fresh one, which :meth:`seeded` makes known.

    Raises:
        SessionError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        )
        for name, value, good, range_ in checks:
            if not good:
                raise SessionError(f"{name} {value} makes no sense; give {range_}")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise SessionError(
                "top-k and top-p choose among draws, and temperature 0 draws nothing; give a temperature"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def seeded(self) -> Sampling:
        """The same with a seed that is known."""
        return self if self.greedy or self.seed is not None else replace(self, seed=secrets.randbits(63))


GREEDY = Sampling()


class Draws:
    """A stream of random numbers for each row, equal for equal seeds whoever else is in the batch.

    Args:
        sampling: its seed, made known before (:meth:`Sampling.seeded`).
        rows: how many.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        streams = np.random.SeedSequence(sampling.seed or 0).spawn(rows)
        self._streams = [np.random.default_rng(s) for s in streams]

    def __call__(self) -> NDArray[np.float64]:
        """The next number in [0, 1) of each row, ``[rows]``."""
        return np.array([stream.random() for stream in self._streams])

    def keep(self, rows: NDArray[Any]) -> None:
        """Forget every row but these."""
        self._streams = [self._streams[r] for r in rows]


class Chooser:
    """Chooses one token a row and remembers what each row has seen.

    Args:
        sampling: how.
        prompts: token ids of each row; only the repetition penalty reads them.
        vocab_size: columns of the logits.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._sampling = sampling.seeded()
        self._seen: NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros((len(prompts), vocab_size), bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True
        self._draws = None if sampling.greedy else Draws(self._sampling, len(prompts))

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Tokens ``[rows]`` for logits ``[rows, vocab]``; the logits are left as they are."""
        if self._seen is not None:
            logits = penalised(logits, self._seen, self._sampling.repetition_penalty)
        if self._draws is None:
            chosen = likeliest(logits)
        else:
            pairs = zip(logits, self._draws(), strict=True)
            chosen = np.array([drawn(row, number, self._sampling) for row, number in pairs], np.int64)
        if self._seen is not None:
            self._seen[np.arange(len(chosen)), chosen] = True
        return chosen

    def keep(self, rows: NDArray[Any]) -> None:
        """Forget every row but these."""
        if self._seen is not None:
            self._seen = self._seen[rows]
        if self._draws is not None:
            self._draws.keep(rows)


def drawn(logits: NDArray[np.float32], number: float, sampling: Sampling) -> int:
    """The token of one row ``[vocab]`` that a random number in [0, 1) stands for."""
    ids, p = distribution(logits, sampling)
    cumulated = p.cumsum()
    place = int(cumulated.searchsorted(number * cumulated[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def likeliest(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Greedy tokens ``[rows]``."""
    tokens: NDArray[np.int64] = logits.argmax(axis=-1).astype(np.int64, copy=False)
    return tokens


def penalised(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Logits of tokens that were seen, divided by the penalty where positive, else multiplied (CTRL, section 4.1)."""
    factor = np.where(logits < 0, np.float32(penalty), np.float32(1) / np.float32(penalty))
    out: NDArray[np.float32] = np.where(seen, logits * factor, logits)
    return out


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be drawn from one row ``[vocab]``, likeliest first, and their probabilities (fp64, sum 1).

    Ties at the edge of top-k are all kept; top-p keeps the smallest set whose probability reaches ``top_p``.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / sampling.temperature  # the largest is 0, however small the temperature
    if 0 < sampling.top_k < len(scores):
        edge = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores >= edge)
    else:
        ids = np.arange(len(scores))
    # The order matters to top-p only, and sorting a whole vocabulary is what a draw would mostly consist of.
    if sampling.top_p < 1:
        ids = ids[np.argsort(-scores[ids], kind="stable")]
    kept = scores[ids]
    p = np.exp(kept - kept.max())
    p /= p.sum()
    if sampling.top_p < 1:
        within = int((p.cumsum() < sampling.top_p).sum()) + 1
        ids, p = ids[:within], p[:within] / p[:within].sum()
    return ids.astype(np.int64, copy=False), p
