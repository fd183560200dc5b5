"""Hands samples that were measured interleaved to pytest-benchmark, one row a side.

pytest-benchmark times one function after the other; sides that must be interleaved cannot be timed that way. So they
are measured by :mod:`bench.latency.interleave` and replayed: the benchmark's timer (its documented ``timer`` option) is
this clock, and the benchmarked function advances it by the recorded sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class ReplayClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds, as far as the replay has come."""
        return self._now

    def advance(self, samples: Iterator[float]) -> None:
        """Move on by the next sample; stays put when there is none left."""
        self._now += next(samples, 0.0)


CLOCK = ReplayClock()


def replay(benchmark: Any, samples: Sequence[float], group: str, **extra: Any) -> None:
    """Show ``samples`` (seconds) as one row of pytest-benchmark's table, with ``extra`` in its JSON."""
    benchmark.group = group
    benchmark.extra_info.update(extra)
    benchmark.pedantic(CLOCK.advance, args=(iter(samples),), rounds=len(samples), iterations=1)
