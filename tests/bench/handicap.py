"""A session that is a little slower than the one inside: what a regression in the decode loop looks like."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class SlowDecode:
    """Each step takes ``share`` longer than it did, by waiting busily."""

    def __init__(self, inner: Any, share: float) -> None:
        self._inner, self._share = inner, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self, ids: Sequence[int]) -> Any:
        started = time.perf_counter()
        logits = self._inner.step(ids)
        until = time.perf_counter() + self._share * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return logits


def five_percent(session: Any) -> Any:
    """Decode 5 % slower."""
    return SlowDecode(session, 0.05)


def half_again(session: Any) -> Any:
    """Decode 50 % slower: found on the noisiest machine."""
    return SlowDecode(session, 0.5)


def crash(session: Any) -> Any:
    """The process dies without a word to Python."""
    import os

    print("about to die", flush=True)
    os.abort()


def hang(session: Any) -> Any:
    """It never comes back."""
    print("hanging", flush=True)
    time.sleep(3600)


def no_memory(session: Any) -> Any:
    """An allocation fails."""
    raise MemoryError("Failed to allocate memory for requested buffer of size 123456789")
