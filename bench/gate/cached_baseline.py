"""A baseline whose scores and generations outlive the process, so that the next folder need not wait for PyTorch again.

Kept by content (weights, tokenizer, precision, kernel, threads, versions) in the user's cache, bounded and hashed
(:mod:`bench.gate.store`). Each result is written as soon as it is there, so a run that was killed goes on where it
stopped.
Try: ``llama-onnx validate FOLDER --baseline demo`` twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from bench.gate.baseline import Baseline, Past, Tokens, head_size
from bench.gate.store import BaselineCache, BaselineKey, baseline_key
from export.cache import CACHE_ENV, cache_dir
from export.source import Source
from runtime.session import Logits


class CachedBaseline(Baseline):
    """See the module.

    Args:
        source: the checkpoint.
        threads: PyTorch's threads; part of the key, because PyTorch does not promise equal bits across them.
        memo_bytes: see :class:`bench.gate.baseline.Baseline`.
        root: folder of the cache; None takes the user's.
        say: told in one line about damaged entries and a bound that is too small.
    """

    def __init__(
        self,
        source: Source,
        threads: int,
        memo_bytes: int = 0,
        root: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(source, threads, memo_bytes)
        self._root, self._say = root, say
        self._caches: dict[str, BaselineCache] = {}

    @cached_property
    def _key(self) -> BaselineKey:
        return baseline_key(self.checkpoint, "fp32", "cpu", "sdpa", self.threads, self.hashes)

    def _cache(self, kind: str) -> BaselineCache:
        if kind not in self._caches:
            precision, attention = ("fp32", kind) if kind == "eager" else (kind, "sdpa")
            key = replace(self._key, precision=precision, attention=attention)
            self._caches[kind] = BaselineCache(key.digest, self._root, say=self._say)
        return self._caches[kind]

    @property
    def key(self) -> str:
        """Digest of everything that decides the results."""
        return self._key.digest

    def recipe(self) -> Callable[[], CachedBaseline]:
        """What opens such a baseline, with the same cache, in another process."""
        root = self._root or (cache_dir() / "baseline" if os.environ.get(CACHE_ENV) else None)
        return partial(CachedBaseline, self.source, self.threads, root=root, say=print_error)

    def _memo_score(self, kind: str, ids: Sequence[int]) -> Logits:
        cache = self._cache(kind)
        logits = cache.logits(ids)
        if logits is None:
            logits = super()._memo_score(kind, ids)
            cache.keep_logits(ids, logits)
        return logits

    def tokens(self, prompts: Sequence[Sequence[int]], limit: int) -> Tokens:
        """Greedy generations, kept or computed now; see :meth:`bench.gate.baseline.Baseline.tokens`."""
        cache = self._cache("fp32")
        request = ["tokens", [list(p) for p in prompts], limit, list(self.eos)]
        kept = cache.value(request)
        if kept is None:
            kept = super().tokens(prompts, limit)
            cache.keep_value(request, kept)
        return tuple(tuple(row) for row in kept)

    def _past_of(self, text: Sequence[int]) -> Past:
        cache, request = self._cache("fp32"), ["past", list(text)]
        flat = cache.array(request)
        if flat is None:
            made = super()._past_of(text)
            cache.keep_array(request, np.stack([t for pair in made for t in pair]).reshape(len(made) * 2, -1))
            return made
        whole = flat.reshape(len(flat) // 2, 2, 1, -1, len(text), head_size(self.config))
        return [(k, v) for k, v in whole]

    def _behind(self, text: Sequence[int], first: Past, length: int, ids: Sequence[int]) -> Logits:
        cache, request = self._cache("fp32"), ["behind", list(text), length, list(ids)]
        logits = cache.array(request)
        if logits is None:
            logits = super()._behind(text, first, length, ids)
            cache.keep_array(request, logits)
        return logits


def print_error(message: str) -> None:
    """A line on standard error, for workers."""
    print(message, file=sys.stderr)
