"""Checks that compute: teacher-forced statistics, and what teacher forcing misses.

Each stands for a way in which a graph with the right attributes could still be wrong on this runtime, and for
third-party exports they are all there is. Measurements and bounds are :mod:`bench.gate.judge`'s.
Try: ``llama-onnx validate FOLDER --baseline demo --only mean_kld,long_context``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.gate import judge
from bench.gate.found import Found
from bench.gate.modes import LARGEST_BATCH
from bench.gate.statistics import kl_divergence
from bench.gate.subject import Subject
from export.spelling import rope_of
from reports.validation import Evidence, Finding, PlaceScore
from runtime.trim import trim

if TYPE_CHECKING:
    from runtime.kv_cache import Loud

Rows = list[tuple[str, float]]
LEAST_TEXT = 8
"""Tokens that the shortest of these comparisons needs."""
PREFILL_TEXT, DECODE_TEXT, BATCH_TEXT, CHUNKED_TEXT = 200, 160, 100, 120
"""Tokens of text that each looks at, where the context has room for them."""
CONTINUED = 16
"""Tokens after a long past."""
LOUDEST = 512
"""The most that the values of a loud token are multiplied by: fp16 ends at 65,504."""
PLACES: dict[str, judge.Judge] = {
    "prefill_logits": judge.places("prefill_logits", "Logits of prefill", "candidate against baseline"),
    "decode_steps": judge.places("decode_steps", "Step-by-step decode", "cache against one pass"),
    "batch_rows": judge.places("batch_rows", "Uneven batches", "prefill and two steps"),
    "chunked_prefill": judge.places("chunked_prefill", "Chunked prefill", "three chunks against one piece"),
    "long_context": judge.places("long_context", "Long context", "mean of the tokens after a long past"),
}
"""The judges of the checks below that look at single places."""


def tokens(name: str) -> Callable[[Subject], Found]:
    """A check that shows one measurement of the teacher-forced comparison."""

    def run(s: Subject) -> Found:
        applies = s.windows and not judge.not_applicable(name, s.terms)
        scores, null = (s.scores, s.null_scores) if applies else ([], [])
        found = judge.judge_tokens(name, scores, null, s.own_loss, s.terms)
        s.baseline.drop_nulls()
        return replace(found, evidence=s.token_evidence) if applies else found

    return run


# -- what teacher forcing misses -------------------------------------------------------------------------------------


def _places(look: Callable[[Subject], Rows]) -> Callable[[Subject], Found]:
    """The check of that name, from the divergences at the places that it looks at."""
    name = look.__name__

    @wraps(look)
    def run(s: Subject) -> Found:
        rows = look(s) if _applies(name, s) else []
        evidence = Evidence(places={name: [PlaceScore(place=place, kld=kld) for place, kld in rows]})
        return replace(PLACES[name](evidence, s.terms), evidence=evidence)

    return run


def _applies(name: str, s: Subject) -> bool:
    return not judge.not_applicable(name, s.terms) and len(_text(s, LEAST_TEXT)) == LEAST_TEXT


def places_expected(s: Subject) -> dict[str, int]:
    """At how many places each check looks, by its name; nothing is opened for it."""
    planned = {
        "prefill_logits": len(_prompts(s)),
        "decode_steps": sum(steps for _, steps in _starts(s)),
        "batch_rows": sum(3 * len(order) for order in _orders(s).values()),
        "chunked_prefill": sum(len(cuts) - 1 for cuts in _cuts(s)),
        "long_context": len(_pasts(s)),
    }
    return {name: count if _applies(name, s) else 0 for name, count in planned.items()}


def _text(s: Subject, length: int) -> list[int]:
    """Ids of the dataset's prose, as many as asked for if there are so many, and a few less than the context."""
    length = min(length, s.context - 4)
    out: list[int] = []
    # Data without prose, or with lines shorter than a chunk: the same places can be looked at in any other text.
    for window in s.windows or ([i for t in s.dataset.texts() for i in s.tokenizer(t)["input_ids"]],):
        out += window
        if len(out) >= length:
            break
    return out[:length]


def _doubling(s: Subject, least: int, most: int) -> list[int]:
    """Powers of two, where kernels, tiles and buffers change; as far as the mode computes and the context reaches."""
    most = min(most, s.mode.longest - CONTINUED, s.context - 2 * CONTINUED)
    return [n for n in (2**k for k in range(1, 24)) if least <= n <= most] if s.mode.places is None else []


def _prompts(s: Subject) -> list[int]:
    """Lengths of prompts: short and usual ones, powers of two and their neighbours."""
    usual = len(_text(s, PREFILL_TEXT))
    around = {m for n in _doubling(s, 2, s.mode.longest) for m in (n - 1, n, n + 1)}
    return sorted({1, 2, 17, min(64, usual), usual} | {m for m in around if m <= len(_text(s, m))})


def _starts(s: Subject) -> list[tuple[int, int]]:
    """Where decode starts, and its steps: early, late in a usual text, and across powers of two."""
    length = len(_text(s, DECODE_TEXT))
    starts = ((3, 12), (length - 25, 24))[: s.mode.places]
    usual = [(start, steps) for start, steps in starts if start >= 1 and start + steps <= length]
    return usual + [(n - 4, 8) for n in _doubling(s, 32, s.mode.longest) if len(_text(s, n + 4)) == n + 4]


def _cuts(s: Subject) -> list[list[int]]:
    """Where prompts are cut into three chunks, the ends included; none for one too short."""
    usual, long = len(_text(s, CHUNKED_TEXT)), len(_text(s, s.mode.longest))
    cuts = [[0, usual // 2, usual // 2 + 5, usual]] if usual >= 12 else []
    middle = max(_doubling(s, CHUNKED_TEXT, long - CONTINUED), default=0)
    return cuts + ([[0, middle - 3, middle + 2, long]] if middle else [])


def _orders(s: Subject) -> dict[str, list[int]]:
    """Lengths of a batch's rows: in several orders, and in batches of powers of two and one more."""
    length = len(_text(s, BATCH_TEXT))
    lengths = [max(1, n) for n in (length - 3, 2, length // 2, length // 4, 1)]
    orders = {"as given": lengths, "shortest first": sorted(lengths), "longest first": sorted(lengths)[::-1]}
    if s.mode.places is None:
        room = max(1, min(length - 3, 23))
        orders |= {f"{n} rows": [7 * k % room + 1 for k in range(n)] for n in (2, 4, 8, 9, 16, LARGEST_BATCH)}
    return dict(list(orders.items())[: s.mode.places])


def _window(s: Subject) -> int | None:
    """The model's attention window, None where it has none or one that all texts reach beyond."""
    from export.architectures import ARCHITECTURES

    config = s.baseline.config
    if known := ARCHITECTURES.get(config.model_type):
        window = known.attention_window(config)
    else:
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    return window if isinstance(window, int) and window > CONTINUED else None


def _pasts(s: Subject) -> dict[str, tuple[int, Loud | None]]:
    """Tokens before the continued ones: to the end of the context, to its middle, around the original rope context,
    and across the attention window: the loud token leaves it halfway through the continued ones."""
    end = s.context
    rope = rope_of(s.baseline.config)
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] in ("default", "dynamic"):
        original = None
    places = {"the end of the context": end - CONTINUED, "the middle of the context": end // 2}
    if original and original + CONTINUED < end:
        places["the original rope context"] = int(original) - CONTINUED // 2
    chosen = list(places.items())[: None if original else s.mode.places]
    pasts: dict[str, tuple[int, Loud | None]] = {title: (length, None) for title, length in chosen if length >= 1}
    window = _window(s)
    if window and window + CONTINUED <= end:
        pasts["the end of the attention window"] = (window, (CONTINUED // 2, float(min(window, LOUDEST))))
    return pasts


@_places
def prefill_logits(s: Subject) -> Rows:
    """The decode graph's own prefill against the baseline at several prompt lengths, one token included."""
    lengths = _prompts(s)
    text = _text(s, lengths[-1])
    wanted = s.baseline.score_at(text, [n - 1 for n in lengths])
    rows: Rows = []
    for n, row in zip(lengths, wanted, strict=True):
        ours = s.candidate.prefill([text[:n]], reserve=0)[0].copy()
        rows.append((f"prompt of {n}", float(kl_divergence(ours[None], row[None])[0])))
    return rows


@_places
def decode_steps(s: Subject) -> Rows:
    """Steps over the KV cache against the baseline's one pass, from an early and a late start."""
    starts = _starts(s)
    text = _text(s, max((start + steps for start, steps in starts), default=0))
    places = sorted({start + k for start, steps in starts for k in range(steps)})
    wanted = dict(zip(places, s.baseline.score_at(text, places), strict=True)) if places else {}
    rows: Rows = []
    for start, steps in starts:
        s.candidate.prefill([text[:start]], reserve=steps)
        for k in range(steps):
            logits = s.candidate.step([text[start + k]])
            rows.append((f"step {k + 1} after {start}", float(kl_divergence(logits, wanted[start + k][None])[0])))
    return rows


@_places
def chunked_prefill(s: Subject) -> Rows:
    """A prompt in three chunks over the cache against the same prompt in one piece."""
    rows: Rows = []
    for cuts in _cuts(s):
        text, past = _text(s, cuts[-1]), None
        names = ["logits", *s.probe.present_names]
        for a, b in itertools.pairwise(cuts):
            found = s.probe.run(text[a:b], past, names)
            past = s.probe.presents(found)
            logits = found["logits"][0][-CHUNKED_TEXT:].astype(np.float32)
            klds = kl_divergence(logits, s.baseline.score_at(text, range(b - len(logits), b)))
            rows.append((f"tokens {b - len(logits)} to {b}, chunk from {a}", float(klds.max())))
    return rows


@_places
def batch_rows(s: Subject) -> Rows:
    """Every row of uneven batches in several orders, prefill and two steps, against the baseline's row alone."""
    text = _text(s, BATCH_TEXT)
    whole = s.baseline.score(text)
    rows: Rows = []
    for title, order in _orders(s).items():
        logits = s.candidate.prefill([text[:n] for n in order], reserve=2).copy()
        for step in range(3):
            wanted = np.stack([whole[n - 1 + step] for n in order])
            rows += [
                (f"{title}, row {i} of {order[i]} tokens, step {step}", float(v))
                for i, v in enumerate(kl_divergence(logits, wanted))
            ]
            if step < 2:
                logits = s.candidate.step([text[n + step] for n in order]).copy()
    return rows


@_places
def long_context(s: Subject) -> Rows:
    """Positions at the end of the context and around the original rope context, after a stacked past."""
    text = _text(s, 64)
    tail = _text(s, 96)[-CONTINUED:]
    rows: Rows = []
    for title, (length, loud) in _pasts(s).items():
        first, wanted = s.baseline.continued(text, length, tail, loud)
        trim()  # the past is in memory once at a time
        logits = s.probe.after_past(tail, first, length, loud).astype(np.float32)
        klds = kl_divergence(logits, wanted[-len(logits) :])
        # The mean over the new tokens: a past stacked is no text, its single places are rougher than a text's.
        rows.append((f"{title} (from {length:,})", float(klds.mean())))
    return rows


def determinism(s: Subject) -> Found:
    """The same prompt and step twice give the same bits."""
    text = _text(s, 60)
    if len(text) < 2:
        return Found("SKIPPED", judge.TOO_SHORT)

    def once() -> list[NDArray[np.float32]]:
        first = s.candidate.prefill([text[:-1]], reserve=1).copy()
        return [first, s.candidate.step([text[-1]]).copy()]

    a, b = once(), once()
    same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    if same:
        return Found("PASS", "two runs equal bit for bit")
    gap = max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
    return Found(
        "FAIL", f"two runs differ by {gap:.3g} in a logit", [Finding(where="logits", what="differ between runs")]
    )
