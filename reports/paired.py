"""The test behind a regression verdict: a moderated paired t on trimmed log ratios, Holm over the family, two looks.

Why not a plain paired t: one process in a hundred is an outlier, which makes a plain t blind (its spread explodes), and
40 benchmarks of 10 pairs each leave 9 degrees of freedom to a threshold of 0.05 / 40. So one pair in ten is trimmed
from each end (Yuen 1974), and where a metric has enough cases their variances are shrunk towards each other (Smyth
2004), as far as the data says that they are alike. ``python -m bench.studies.simulate`` proves what this is worth.

Pure functions of arrays. Try: ``python -c "from reports.paired import assess; help(assess)"``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma, stdtr, stdtrit

from reports.base import grouped

TRIM = 0.1
"""Share of the pairs trimmed from each end."""
LEAST_PAIRS = 5
"""Fewer valid pairs decide nothing."""
POOL_FROM = 8
"""Cases of one metric from which variances are shrunk towards each other; fewer cannot show how alike they are."""
RESOLUTION = 1e-3
"""Least standard deviation of a log ratio that is believed: equal samples (bytes, coarse clocks) prove no more."""
POWER = 0.9
MOST_PAIRS_NEEDED = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Centre and variance of each row. ``variance / n`` is the squared standard error of ``centre``."""

    centre: Floats
    variance: Floats
    df: Floats
    n: NDArray[np.int64]


@dataclass(frozen=True)
class Prior:
    """What the variances of one metric have in common: ``df`` 0 means nothing is shared."""

    variance: float
    df: float


@dataclass(frozen=True)
class Tested:
    """One look at a family; arrays of one entry a row, logarithms of ratios. ``p_holm`` is held against ``alpha``."""

    centre: Floats
    error: Floats
    df: Floats
    low: Floats
    high: Floats
    p: Floats
    p_holm: Floats
    priors: dict[Hashable, Prior]

    def row(self, k: int) -> dict[str, float]:
        """One row as the fields of a result; estimate and interval as ratios."""
        ratios = {"ratio": self.centre, "low": self.low, "high": self.high}
        others = {"p": self.p, "p_holm": self.p_holm, "df": self.df}
        return {n: math.exp(x[k]) for n, x in ratios.items()} | {n: float(x[k]) for n, x in others.items()}


def trimmed(rows: Sequence[Sequence[float]] | Floats) -> Spread:
    """Trimmed mean, and the variance that its standard error comes from (Yuen 1974, *Biometrika* 61).

    With g = floor(TRIM n) cut from each end and h = n - 2g left: SE^2 = (n - 1) s_w^2 / (h (h - 1)), s_w^2 the
    variance of the winsorised row, with h - 1 degrees of freedom. Rows may be of uneven length.

    Raises:
        ValueError: a row with fewer than two values.
    """
    lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
    if lengths.size and lengths.min() < 2:
        raise ValueError("a spread needs two values or more")
    centre, variance, df = (np.zeros(len(rows)) for _ in range(3))
    for n in np.unique(lengths).tolist():
        chosen = np.flatnonzero(lengths == n)
        block = np.sort(np.asarray([rows[int(i)] for i in chosen], dtype=float), axis=1)
        g = int(TRIM * n)
        h = n - 2 * g
        centre[chosen] = block[:, g : n - g].mean(axis=1)
        if g:
            block[:, :g] = block[:, g : g + 1]
            block[:, n - g :] = block[:, n - g - 1 : n - g]
        variance[chosen] = n * (n - 1) * block.var(axis=1, ddof=1) / (h * (h - 1)) if h > 1 else np.inf
        df[chosen] = h - 1
    return Spread(centre, np.maximum(variance, RESOLUTION**2), df, lengths)


def _inverse_trigamma(y: float) -> float:
    """x with trigamma(x) = y, by Newton steps on 1 / trigamma, which is nearly straight (Smyth 2004, appendix)."""
    x = 0.5 + 1 / y
    for _ in range(50):
        value = float(polygamma(1, x))
        step = value * (1 - value / y) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def fit_prior(variance: Floats, df: Floats) -> Prior:
    """The scaled F distribution that a metric's variances come from (Smyth 2004, section 6.2).

    With z = ln s^2 and e = z - digamma(d / 2) + ln(d / 2): trigamma(d0 / 2) = var(e) - mean trigamma(d / 2) and
    s0^2 = exp(mean e + digamma(d0 / 2) - ln(d0 / 2)). An e that varies no more than sampling explains gives d0 = inf.
    """
    half = df / 2
    e = np.log(variance) - digamma(half) + np.log(half)
    excess = float(e.var(ddof=1) - polygamma(1, half).mean())
    if excess <= 0:
        return Prior(float(np.exp(e.mean())), math.inf)
    d0 = 2 * _inverse_trigamma(excess)
    return Prior(float(np.exp(e.mean() + digamma(d0 / 2) - math.log(d0 / 2))), d0)


def moderate(spread: Spread, groups: Sequence[Hashable]) -> tuple[Floats, Floats, dict[Hashable, Prior]]:
    """Variances shrunk towards their metric's prior, their degrees of freedom, and the priors.

    v = (d0 s0^2 + d s^2) / (d0 + d) with d0 + d degrees of freedom, at most those of all the rows together. Groups
    of fewer than ``POOL_FROM`` rows are left alone.
    """
    variance, df = spread.variance.copy(), spread.df.copy()
    priors: dict[Hashable, Prior] = {}
    for group, rows in grouped(range(len(groups)), lambda k: groups[k]).items():
        if len(rows) < POOL_FROM:
            continue
        at = np.asarray(rows)
        prior = fit_prior(spread.variance[at], spread.df[at])
        priors[group] = prior
        if math.isinf(prior.df):
            variance[at], df[at] = prior.variance, spread.df[at].sum()
            continue
        total = prior.df + spread.df[at]
        variance[at] = (prior.df * prior.variance + spread.df[at] * spread.variance[at]) / total
        df[at] = np.minimum(total, spread.df[at].sum())
    return variance, df, priors


def holm(p: Floats, size: int, member: NDArray[np.bool_] | None = None) -> Floats:
    """Holm's adjusted p-values (1979) in a family of ``size``; members not in ``p`` count as not rejected.

    ``member`` tells which of ``p`` belong to the family (None: all); the others stay as they are.
    """
    of = np.arange(p.size) if member is None else np.flatnonzero(member)
    order = of[np.argsort(p[of], kind="stable")]
    adjusted = p.copy()
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * (size - np.arange(order.size))))
    return adjusted


def assess(
    rows: Sequence[Sequence[float]] | Floats,
    groups: Sequence[Hashable],
    size: int,
    gating: NDArray[np.bool_] | None = None,
    looks: int = 2,
    alpha: float = 0.05,
) -> Tested:
    """One look at a family.

    Args:
        rows: for each result its valid pairs' ln(candidate / base); uneven lengths allowed.
        groups: the metric of each row; variances are shared inside a group only.
        size: gating results in the family, those decided at an earlier look included.
        gating: which rows belong to the family (None: all); the others get ``p_holm`` as if each stood alone.
        looks: Bonferroni over so many looks: ``p_holm`` is multiplied by it, intervals have 1 - alpha / looks ...
        alpha: family-wise error over all looks.

    Returns:
        See :class:`Tested`. The interval is two-sided at 1 - 2 alpha / looks (95 % for two looks of alpha 0.05), so
        that its upper end is the one-sided bound of level alpha / looks on which non-inferiority is decided.
    """
    spread = trimmed(rows)
    variance, df, priors = moderate(spread, groups)
    member = np.ones(len(groups), bool) if gating is None else gating
    found = tested(spread.centre, np.sqrt(variance / spread.n), df, size, member, alpha / looks)
    return replace(found, p_holm=np.minimum(1.0, looks * found.p_holm), priors=priors)


def tested(centre: Floats, error: Floats, df: Floats, size: int, member: NDArray[np.bool_], tail: float) -> Tested:
    """Two-sided t-tests of estimates, Holm over the members of a family of ``size``; ``error`` is the standard error.

    The ends of the interval each leave ``tail`` outside.
    """
    p = 2 * stdtr(df, -np.abs(centre) / error)
    half = stdtrit(df, 1 - tail) * error
    return Tested(centre, error, df, centre - half, centre + half, p, holm(p, size, member), {})


def decide(tested: Tested, margins: Floats, alpha: float = 0.05) -> NDArray[Any]:
    """The status of each row: REGRESSION, IMPROVED, EQUIVALENT or INCONCLUSIVE.

    ``margins`` are logarithms, ln(1 + 3 %). REGRESSION: a change that is surely one (``p_holm`` <= alpha) and whose
    estimate lies at or beyond the margin. Were the *bound* asked to lie beyond it, a real 5 % would be missed in one
    run of five at 10 pairs. IMPROVED is the same on the other side. EQUIVALENT: the interval's upper end is inside
    the margin (non-inferior), which an estimate at or beyond the margin can never be.
    """
    sure = tested.p_holm <= alpha
    return np.select(
        [sure & (tested.centre >= margins), sure & (tested.centre <= -margins), tested.high < margins],
        ["REGRESSION", "IMPROVED", "EQUIVALENT"],
        "INCONCLUSIVE",
    )


def pairs_needed(
    centre: float, sd: float, margin: float, size: int, looks: int = 2, alpha: float = 0.05, have: int = 0
) -> int | None:
    """Pairs that would decide with 90 % probability if the estimate were the truth; None above ``MOST_PAIRS_NEEDED``.

    The least n with n >= ((t_(1 - a, n - 1) + t_(power, n - 1)) sd / distance)^2. Inside the margin non-inferiority
    decides: a = alpha / looks, distance = margin - centre; beyond it significance against no change does: a = alpha /
    (2 looks size), distance = centre. At least one more than was measured: those did not decide.
    """
    inside = centre < margin
    tail = alpha / looks if inside else alpha / (2 * looks * size)
    distance = margin - centre if inside else centre
    n = np.arange(LEAST_PAIRS, MOST_PAIRS_NEEDED + 1)
    enough = n >= ((stdtrit(n - 1, 1 - tail) + stdtrit(n - 1, POWER)) * sd / max(distance, 1e-12)) ** 2
    return max(int(n[enough.argmax()]), have + 1) if enough.any() else None
