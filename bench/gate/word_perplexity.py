"""Word perplexity of whole documents, as lm-evaluation-harness computes it for WikiText-2.

The likelihood is of the detokenised text, the count is of words of the *original* text: so metrics of models with
different tokenizers may be compared. Try: ``llama-onnx perplexity FOLDER --dataset hf:wikitext``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.items import Dataset
from bench.errors import DatasetError
from runtime.session import Session

LARGEST_WINDOW = 2048
"""Default window where the context is longer: logits of 8,192 positions x 49,152 tokens would take 1.6 GB a side."""


@dataclass(frozen=True)
class Window:
    """``inputs`` goes through the model; its last ``len(targets)`` positions predict ``targets``."""

    document: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class WordPerplexity:
    """Metrics over all documents; ``nats`` is the summed negative log-likelihood of each document."""

    nats: tuple[float, ...]
    words: tuple[int, ...]
    bytes: tuple[int, ...]
    tokens: int
    settings: str

    @property
    def word_perplexity(self) -> float:
        """exp(nats / words); infinite for a text in a language without blanks, whose documents are one word each."""
        return exp(math.fsum(self.nats) / sum(self.words))

    @property
    def byte_perplexity(self) -> float:
        """exp(nats / UTF-8 bytes of the original)."""
        return exp(math.fsum(self.nats) / sum(self.bytes))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for one byte of the original."""
        return math.fsum(self.nats) / sum(self.bytes) / math.log(2)

    def ratio(self, baseline: WordPerplexity) -> float:
        """This word perplexity over a baseline's of the same documents, also where both are infinite."""
        return exp(math.fsum([*self.nats, *(-n for n in baseline.nats)]) / sum(self.words))


def exp(x: float) -> float:
    """exp(x), infinite where a float cannot hold it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def rolling_windows(ids: Sequence[int], prefix: int, length: int, document: int = 0) -> list[Window]:
    """Cut a document so that each token is predicted once, by at most ``length`` tokens before it.

    The first token is predicted from ``prefix`` (the begin or end token). Full windows do not overlap but for one
    token; the last one is filled up with context to the left (lm-evaluation-harness, rolling windows with a context
    of 1).
    """
    if length < 1:
        raise ValueError(f"a window of {length} tokens makes no sense; give 1 or more")
    before = [prefix, *ids]
    windows = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        windows.append(Window(document, tuple(before[max(0, end - length) : end]), tuple(ids[start:end])))
    return windows


def window_nats(session: Session, window: Window) -> float:
    """Negative log-likelihood (nats) of a window's targets, summed in float64."""
    logits = session.score(window.inputs)[-len(window.targets) :]
    return float(target_nats(logits, window.targets).sum())


def target_nats(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """-log softmax at the targets; ``logits`` ``[tokens, vocab]`` -> ``[tokens]``, row by row to spare memory."""
    out = np.empty(len(targets))
    for k, (row, target) in enumerate(zip(logits, targets, strict=True)):
        wide = row.astype(np.float64)
        top = wide.max()
        out[k] = top + math.log(np.exp(wide - top).sum()) - wide[target]
    return out


def prefix_token(tokenizer: Any) -> int:
    """The token that stands before a document: the begin token, else the end token.

    Raises:
        DatasetError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DatasetError("the tokenizer has neither a begin nor an end token, so word perplexity has no first context")


def document_windows(dataset: Dataset, tokenizer: Any, context: int, window: int | None = None) -> list[Window]:
    """Rolling windows of every perplexity document.

    Raises:
        DatasetError: the dataset has no such document, or a window beyond the context.
    """
    length = min(context, LARGEST_WINDOW) if window is None else window
    if not 1 <= length <= context:
        raise DatasetError(f"a window of {length} tokens does not fit the context of {context}; give 1 to {context}")
    texts = dataset.prose()
    if not texts:
        raise DatasetError(f"{dataset.name} has no documents to score; use one with perplexity items, as hf:wikitext")
    first = prefix_token(tokenizer)
    found: list[Window] = []
    for k, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += rolling_windows(ids, first, length, k)
    return found


def assemble(dataset: Dataset, windows: Sequence[Window], nats: Sequence[float]) -> WordPerplexity:
    """Chunks' sums -> metrics. Words are what lies between white space in the original, as the harness counts."""
    originals = [i.fields.get("original", i.fields["text"]) for i in dataset.items if i.task == "perplexity"]
    sums = [math.fsum(n for w, n in zip(windows, nats, strict=True) if w.document == k) for k in range(len(originals))]
    longest = max(len(w.inputs) for w in windows)
    return WordPerplexity(
        nats=tuple(sums),
        words=tuple(len(re.split(r"\s+", t)) for t in originals),
        bytes=tuple(len(t.encode()) for t in originals),
        tokens=sum(len(w.targets) for w in windows),
        settings=f"rolling windows (longest {longest} tokens), words of the original text; {dataset.name}",
    )
