"""A session that is a little slower than the one inside: what a regression in the decode loop looks like.

Run in place of ``bench/latency/measure_case.py``, it measures a :class:`Handicapped` side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.latency import measure_case
from bench.latency.sides import SideSpec
from reports.comparison import ComparedSide

CHILD = Path(__file__)


@dataclass(frozen=True)
class Handicapped(SideSpec):
    """A side whose session is given to the function ``handicap`` of this module."""

    handicap: str = ""

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "handicap": self.handicap}

    def described(self) -> ComparedSide:
        plain = super().described()  # a page must not hide it
        return plain.model_copy(update={"label": f"{plain.label}, handicap {self.handicap}"})


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


if __name__ == "__main__":
    opened, name = measure_case._open, json.loads(sys.argv[1]).get("handicap")
    if name:
        measure_case._open = lambda a: globals()[name](opened(a))
    sys.exit(measure_case.main())
