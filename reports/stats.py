"""Statistics of latency samples: why a number on the page may be printed, and how far it may be trusted.

Pure functions of numbers and of a record; nothing here formats or prints. Too few samples give
``None``, never a guess.

Try: ``python -c "from reports.stats import median; print(median([24.8, 25.1, 24.7, 24.9, 25.0, 26.2]))"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import bdtr

from reports.record import Case, Floor, PrefillFloor, Round, RunRecord, Series

Metric = Literal["ttft", "tpot", "total"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "total")

SPREAD_LIMIT = 0.025
"""Relative spread above which a series is called noisy."""

PERCENTILE_MINIMUM = {90: 64, 95: 130, 99: 662}
"""Samples from which a percentile is printed: fewer leave its upper 95 % bound to a handful of extremes."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; the ends are ``None`` when ``n`` samples are too few for one."""

    value: float
    low: float | None
    high: float | None
    n: int

    def inverse(self) -> Estimate:
        """The estimate of 1 / x: a time ratio of 0.25 becomes 4 times as fast. The ends change places."""
        low = None if self.high is None else 1 / self.high
        high = None if self.low is None else 1 / self.low
        return Estimate(1 / self.value, low, high, self.n)

    def times(self, scale: float) -> Estimate:
        """The estimate of ``scale`` * x, of a positive scale."""
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return Estimate(self.value * scale, low, high, self.n)


@dataclass(frozen=True)
class Comparison:
    """Two sides on one case and metric, paired by round. ``ratio`` is candidate time / other time."""

    candidate: Estimate
    other: Estimate
    ratio: Estimate

    @property
    def speedup(self) -> Estimate:
        """How many times as fast the candidate is: other time / candidate time."""
        return self.ratio.inverse()


def median(samples: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Median with the distribution-free interval between two order statistics.

    The number of samples below the median is Binomial(n, 1/2); with j the smallest integer whose cumulative
    probability reaches (1 - confidence) / 2, the interval is [x_(j), x_(n+1-j)] (David and Nagaraja, *Order
    Statistics*, 3rd ed., 7.1). At 95 % it needs n >= 6; below that the ends are ``None``.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("median of no samples")
    ordered = sorted(samples)
    n = len(ordered)
    tail = (1 - confidence) / 2
    j = int(np.searchsorted(bdtr(np.arange(n), n, 0.5), tail))
    centre = float(np.median(ordered))
    return Estimate(centre, ordered[j - 1], ordered[n - j], n) if j else Estimate(centre, None, None, n)


def percentile(samples: Sequence[float], q: int) -> float | None:
    """The q-th percentile (q is 90, 95 or 99; linear between order statistics, Hyndman and Fan 1996, type 7).

    ``None`` from fewer samples than ``PERCENTILE_MINIMUM`` asks for.
    """
    return float(np.percentile(samples, q)) if len(samples) >= PERCENTILE_MINIMUM[q] else None


def relative_spread(samples: Sequence[float]) -> float | None:
    """Robust relative spread: 1.4826 * median(abs(x - median)) / median.

    A relative standard deviation if x were normal (Rousseeuw and Croux 1993); one stray round does not move
    it. ``None`` from fewer than three samples or where the median is not positive.
    """
    if len(samples) < 3:
        return None
    centre = float(np.median(samples))
    return 1.4826 * float(np.median(np.abs(np.asarray(samples) - centre))) / centre if centre > 0 else None


def paired_ratio(candidate: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Ratio candidate / other of samples that were taken in pairs: the median of the pairs' ratios, see ``median``.

    Drift that both share cancels out within a pair, and one stray pair does not move the median. The pairs are the
    first min(len) samples of both.

    Raises:
        ValueError: no pair, or a sample that is not positive.
    """
    pairs = list(zip(candidate, other, strict=False))
    if not pairs:
        raise ValueError("ratio of no pairs")
    if min(min(pair) for pair in pairs) <= 0:
        raise ValueError("ratio needs positive samples")
    return median([a / b for a, b in pairs], confidence)


def floor_multiples(floor: Floor, case: Case, tpots: Sequence[float]) -> list[float]:
    """TPOT of each round as a multiple of the memory floor: tpot_i * bandwidth_i / bytes of a step.

    A round is held against the bandwidth that was measured beside it, since both drift together. Where rounds and
    bandwidth samples differ in number (a case without samples of its own), each is held against their median.
    """
    speeds = floor.bandwidth_samples
    if len(speeds) != len(tpots):
        speeds = [median(speeds).value] * len(tpots)
    return [tpot * speed / floor.step_bytes(case) for tpot, speed in zip(tpots, speeds, strict=True)]


def prefill_floors(floor: PrefillFloor, case: Case) -> list[float]:
    """Least seconds of a prefill of that case, one a round: its operations over the plain product's rate.

    Empty where they are not counted, or no product was measured beside the case.
    """
    if floor.products is None:
        return []
    operations = floor.products.operations(case)
    return [operations / rate for m in floor.measured if m.case == case for rate in m.rates]


def prefill_multiples(floor: PrefillFloor, case: Case, ttfts: Sequence[float]) -> list[float]:
    """TTFT of each round as a multiple of the matrix-product floor measured beside it; empty without one."""
    floors = prefill_floors(floor, case)
    if floors and len(floors) != len(ttfts):
        floors = [median(floors).value] * len(ttfts)
    return [ttft / least for ttft, least in zip(ttfts, floors, strict=True)] if floors else []


def round_value(one: Round, metric: Metric) -> float | None:
    """One metric of one round, seconds; ``None`` where the round has no such thing (TPOT of one token)."""
    value: float | None = getattr(one, f"{metric}_s")
    return value


def samples(series: Series | None, metric: Metric) -> list[float]:
    """One sample per round, seconds, in the order of the rounds; empty where nothing was measured."""
    values = [round_value(r, metric) for r in series.rounds] if series else []
    return [v for v in values if v is not None]


def compare(record: RunRecord, case: Case, metric: Metric, candidate_label: str, other_label: str) -> Comparison | None:
    """Two sides on one case, paired by the index of the round.

    ``None`` where a side was not measured or holds a time that is not positive (a broken clock, which the
    verdict warns of). A round that lacks the metric takes its partner out with it.
    """
    first, second = record.find(case, candidate_label), record.find(case, other_label)
    if first is None or second is None:
        return None
    values = ((round_value(r, metric) for r in series.rounds) for series in (first, second))
    both = [(a, b) for a, b in zip(*values, strict=False) if a is not None and b is not None]
    if not both or min(min(pair) for pair in both) <= 0:
        return None
    return Comparison(
        candidate=median(samples(first, metric)),
        other=median(samples(second, metric)),
        ratio=paired_ratio([a for a, _ in both], [b for _, b in both]),
    )
