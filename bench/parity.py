"""Pure statistics of the parity gate: per-token figures -> checks with one-sided 95 % bounds.

Parity is an equivalence test, not a failure to find a difference: a tier passes only when the *bound* lies inside its
margin, and too few tokens is INCONCLUSIVE. Tokens of one chunk depend on each other, so chunks are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_distribution

from reports.record import Check, Status

Array = NDArray[np.float64]
RESAMPLES = 2000
SUSPICIOUS_FACTOR = 10.0
"""A figure inside its margin but this many times its null control is shown as suspicious."""


@dataclass(frozen=True)
class Tier:
    """Margins of one precision (DESIGN.md): see the fields of :class:`TokenFigures`. None: reported, not judged."""

    name: str
    ppl_ratio: float
    mean_kld: float
    tail_kld: float | None
    top1: float
    task_ratio: float
    greedy: float


TIERS = {
    "fp32": Tier("fp32", 1.00001, 1e-8, 1e-6, 0.9995, 0.999, 0.98),
    "fp16": Tier("fp16", 1.001, 1e-4, 2e-3, 0.995, 0.999, 0.80),
    "bf16": Tier("bf16", 1.005, 2.5e-3, 3e-2, 0.965, 0.99, 0.50),
    "int8": Tier("int8", 1.005, 2e-3, 2e-2, 0.975, 0.99, 0.50),
    "int4": Tier("int4", 1.02, 2e-2, None, 0.94, 0.99, 0.20),
}


@dataclass(frozen=True)
class TokenFigures:
    """One chunk, scored by both sides on the same ids.

    All arrays are ``[tokens]`` in float64: negative log-likelihood of the right token (nats) for candidate and
    baseline, KL divergence baseline || candidate (nats), and whether both put the same token first.
    """

    nll_candidate: Array
    nll_baseline: Array
    kld: Array
    same_top1: NDArray[np.bool_]


def token_figures(candidate: NDArray[np.float32], baseline: NDArray[np.float32], ids: Sequence[int]) -> TokenFigures:
    """Compare two sides' logits ``[length, vocab]`` on ``ids`` (position t predicts token t + 1).

    KLD is summed in float64 from log-softmax in float64: divergences of 1e-11 drown in fp32 rounding.

    Raises:
        ValueError: the logits differ in shape, or are not finite.
    """
    import torch

    if candidate.shape != baseline.shape or len(candidate) != len(ids):
        raise ValueError(f"logits {candidate.shape} and {baseline.shape} do not fit {len(ids)} ids")
    logs = []
    for logits in (candidate, baseline):
        if not np.isfinite(logits[:-1]).all():
            raise ValueError("the logits hold NaN or infinity")
        logs.append(torch.log_softmax(torch.from_numpy(logits[:-1]).double(), dim=-1))
    q, p = logs
    kld = (p.exp() * (p - q)).sum(dim=-1)
    right = torch.tensor(list(ids[1:]))[:, None]
    return TokenFigures(
        -q.gather(1, right)[:, 0].numpy(),
        -p.gather(1, right)[:, 0].numpy(),
        kld.numpy(),
        (q.argmax(-1) == p.argmax(-1)).numpy(),
    )


def bootstrap_bound(
    chunks: Sequence[Array],
    statistic: Callable[[Array], float],
    quantile: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> float:
    """One-sided bound of a statistic of pooled tokens: bootstrap over chunks (percentile method)."""
    rng = np.random.default_rng(seed)
    n = len(chunks)
    values = np.empty(resamples)
    for k in range(resamples):
        values[k] = statistic(np.concatenate([chunks[i] for i in rng.integers(0, n, n)]))
    return float(np.quantile(values, quantile))


def mean_bounds(chunks: Sequence[Array], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """One-sided 95 % bounds (lower, upper) of the pooled mean: bootstrap over chunks."""
    sums = np.asarray([c.sum() for c in chunks])
    sizes = np.asarray([float(len(c)) for c in chunks])
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(chunks), (resamples, len(chunks)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [0.05, 0.95])
    return float(low), float(high)


def agreement_bounds(agree: int, n: int) -> tuple[float, float]:
    """One-sided 95 % Clopper-Pearson bounds (lower, upper) of a proportion (Clopper and Pearson, 1934)."""
    low = 0.0 if agree == 0 else float(beta_distribution.ppf(0.05, agree, n - agree + 1))
    high = 1.0 if agree == n else float(beta_distribution.ppf(0.95, agree + 1, n - agree))
    return low, high


def tokens_needed(limit: float, agreement: float = 1.0) -> int:
    """Tokens from which an agreement of that rate has its lower 95 % bound above ``limit``; 0 if none is enough."""
    if agreement <= limit:
        return 0
    n = 64
    while n < 10**8 and agreement_bounds(math.floor(agreement * n), n)[0] < limit:
        n *= 2
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        if agreement_bounds(math.floor(agreement * middle), middle)[0] < limit:
            low = middle
        else:
            high = middle
    return high


def decide(bound: float, opposite: float, limit: float, better: Literal["lower", "higher"]) -> Status:
    """PASS when the demanding bound is inside the limit, FAIL when even the generous one is outside."""
    inside = (lambda v: v <= limit) if better == "lower" else (lambda v: v >= limit)
    if inside(bound):
        return "PASS"
    return "INCONCLUSIVE" if inside(opposite) else "FAIL"


def _suspicious(status: Status, value: float, null: float | None) -> Status:
    if status == "PASS" and null is not None and value > SUSPICIOUS_FACTOR * max(null, 1e-12):
        return "SUSPICIOUS"
    return status


def _tail(values: Array) -> float:
    return float(np.quantile(values, 0.999))


def teacher_forced_checks(
    figures: Sequence[TokenFigures], null: Sequence[TokenFigures], tier: Tier, seed: int
) -> list[Check]:
    """Perplexity ratio, KL divergence (mean, 99.9 %, max) and top-1 agreement against a tier.

    Args:
        figures: candidate against baseline, one entry a chunk.
        null: the baseline against itself with another attention kernel, possibly fewer chunks.
        tier: the margins.
        seed: of the bootstrap.
    """
    kld = [f.kld for f in figures]
    tokens = int(sum(len(k) for k in kld))
    log_ratio = [f.nll_candidate - f.nll_baseline for f in figures]
    pooled = np.concatenate(kld)
    null_kld = np.concatenate([f.kld for f in null]) if null else None
    ppl = math.exp(float(np.mean(np.concatenate([f.nll_baseline for f in figures]))))
    where = f"{tokens} tokens in {len(figures)} chunks"

    low, high = (math.exp(v) for v in mean_bounds(log_ratio, seed))
    ratio = math.exp(float(np.concatenate(log_ratio).mean()))
    null_ratio = (
        math.exp(float(np.mean(np.concatenate([f.nll_candidate - f.nll_baseline for f in null])))) if null else None
    )
    checks = [
        Check(
            name="perplexity_ratio",
            title="Perplexity ratio",
            status=decide(high, low, tier.ppl_ratio, "lower"),
            value=ratio,
            bound=high,
            limit=tier.ppl_ratio,
            better="lower",
            null_value=null_ratio,
            samples=tokens,
            unit="",
            detail=f"baseline perplexity {ppl:.4f} over {where}",
        )
    ]
    low, high = mean_bounds(kld, seed)
    null_mean = float(null_kld.mean()) if null_kld is not None else None
    mean = float(pooled.mean())
    checks.append(
        Check(
            name="mean_kld",
            title="Mean KL divergence",
            status=_suspicious(decide(high, low, tier.mean_kld, "lower"), mean, null_mean),
            value=mean,
            bound=high,
            limit=tier.mean_kld,
            better="lower",
            null_value=null_mean,
            samples=tokens,
            unit="nats",
            detail=where,
        )
    )
    high = bootstrap_bound(kld, _tail, 0.95, seed, 500)
    low = bootstrap_bound(kld, _tail, 0.05, seed, 500)
    null_tail = _tail(null_kld) if null_kld is not None else None
    status = "REPORTED" if tier.tail_kld is None else decide(high, low, tier.tail_kld, "lower")
    checks.append(
        Check(
            name="tail_kld",
            title="99.9 % KL divergence",
            status=_suspicious(status, _tail(pooled), null_tail),
            value=_tail(pooled),
            bound=high,
            limit=tier.tail_kld,
            better="lower",
            null_value=null_tail,
            samples=tokens,
            unit="nats",
            detail=f"{where}; largest {pooled.max():.2e}",
        )
    )
    checks.append(_agreement_check(figures, null, tier, seed, tokens, where))
    return checks


def _agreement_check(
    figures: Sequence[TokenFigures],
    null: Sequence[TokenFigures],
    tier: Tier,
    seed: int,
    tokens: int,
    where: str,
) -> Check:
    agree = int(sum(f.same_top1.sum() for f in figures))
    cp_low, cp_high = agreement_bounds(agree, tokens)
    boot_low, boot_high = mean_bounds([f.same_top1.astype(np.float64) for f in figures], seed)
    # A bootstrap of all-equal tokens has no width: the binomial bound says what so many tokens can show.
    low, high = min(cp_low, boot_low), max(cp_high, boot_high)
    status = decide(low, high, tier.top1, "higher")
    detail = f"{tokens - agree} of {tokens} tokens differ; {where}"
    if status == "INCONCLUSIVE":
        need = tokens_needed(tier.top1, agree / tokens)
        detail += f"; about {need} tokens would decide" if need else "; more tokens of this rate would not pass"
    return Check(
        name="top1_agreement",
        title="Top-1 agreement",
        status=status,
        value=agree / tokens,
        bound=low,
        limit=tier.top1,
        better="higher",
        null_value=float(np.concatenate([f.same_top1 for f in null]).mean()) if null else None,
        samples=tokens,
        unit="",
        detail=detail,
    )
