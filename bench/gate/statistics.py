"""Pure statistics of the parity gate: per-token scores -> measurements with one-sided 95 % bounds.

Parity is an equivalence test, not a failure to find a difference: a tier passes only when the *bound* lies inside its
margin, and too few tokens is INCONCLUSIVE. Tokens of one chunk depend on each other, so chunks are resampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta as beta_distribution
from scipy.stats import binom

from bench.gate.word_perplexity import exp
from reports.validation import Measurement, Status

Array = NDArray[np.float64]
Logits = NDArray[np.float32]
RESAMPLES = 2000
ROWS = 16
"""Positions that are compared at a time: a whole window in float64 would take 0.75 GB with 49,152 tokens."""
SUSPICIOUS_FACTOR = 10.0
"""A value inside its margin but this many times its null control is shown as suspicious."""


@dataclass(frozen=True)
class Tier:
    """A tolerance tier: margins of one precision (docs/gate.md). ``tail_kld`` None: reported, not judged."""

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
class TokenScores:
    """One chunk, scored by both sides on the same ids.

    All arrays are ``[tokens]`` in float64: negative log-likelihood of the right token (nats) for candidate and
    baseline, KL divergence baseline || candidate (nats), and whether both put the same token first.
    """

    nll_candidate: Array
    nll_baseline: Array
    kld: Array
    same_top1: NDArray[np.bool_]


def _log_probabilities(candidate: Logits, baseline: Logits) -> tuple[Any, Any, Any]:
    """Log-softmax of both (candidate, baseline) and KL divergence baseline || candidate by row, float64 tensors.

    All of it in float64: divergences of 1e-11 drown in fp32 rounding.
    """
    import torch

    q, p = (
        torch.log_softmax(torch.from_numpy(np.ascontiguousarray(x)).double(), dim=-1) for x in (candidate, baseline)
    )
    return q, p, (p.exp() * (p - q)).sum(dim=-1)


def score_tokens(candidate: Logits, baseline: Logits, ids: Sequence[int]) -> TokenScores:
    """Compare two sides' logits ``[length, vocab]`` on ``ids`` (position t predicts token t + 1).

    Raises:
        ValueError: the logits differ in shape, or are not finite.
    """
    import torch

    if candidate.shape != baseline.shape or len(candidate) != len(ids):
        raise ValueError(f"logits {candidate.shape} and {baseline.shape} do not fit {len(ids)} ids")
    places = len(ids) - 1
    # Made before the large blocks: small ones that came between them would keep their freed memory apart.
    nll, nll_baseline, kld = (torch.empty(places, dtype=torch.float64) for _ in range(3))
    agree = torch.empty(places, dtype=torch.bool)
    blocks = -(-places // ROWS) or 1
    cuts = [places * k // blocks for k in range(blocks + 1)]  # even, since a sum over few rows is split among threads
    for rows in (slice(a, b) for a, b in itertools.pairwise(cuts)):
        if not (np.isfinite(candidate[rows]).all() and np.isfinite(baseline[rows]).all()):
            raise ValueError("the logits hold NaN or infinity")
        q, p, kld[rows] = _log_probabilities(candidate[rows], baseline[rows])
        right = torch.tensor(list(ids[rows.start + 1 : rows.stop + 1]), dtype=torch.int64)[:, None]
        for loss, x in ((nll, q), (nll_baseline, p)):
            loss[rows] = -x.gather(1, right)[:, 0]
        agree[rows] = q.argmax(-1) == p.argmax(-1)
    return TokenScores(nll.numpy(), nll_baseline.numpy(), kld.numpy(), agree.numpy())


def kl_divergence(candidate: Logits, baseline: Logits) -> Array:
    """KL divergence baseline || candidate of each row of logits ``[rows, vocab]``, nats; infinite where not finite."""
    if candidate.shape != baseline.shape:
        raise ValueError(f"logits {candidate.shape} and {baseline.shape} do not fit")
    kld: Array = _log_probabilities(candidate, baseline)[2].numpy()
    return np.where(np.isfinite(candidate).all(axis=-1), kld, np.inf)


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


TAIL = 0.001
"""Share of tokens above the 99.9 % quantile."""


def _tail(values: Array) -> float:
    return float(np.quantile(values, 1 - TAIL))


def design_effect(chunks: Sequence[NDArray[np.bool_]]) -> float:
    """By how much chunks widen the variance of a share over that of independent tokens; at least 1.

    Kish (1965), "Survey Sampling", 8.2: the ratio of the variance between clusters to the binomial one.
    """
    n = sum(len(c) for c in chunks)
    share = sum(int(c.sum()) for c in chunks) / n
    if len(chunks) < 2 or share in (0.0, 1.0):
        return 1.0
    between = sum((float(c.sum()) - share * len(c)) ** 2 for c in chunks) * len(chunks) / (len(chunks) - 1)
    return max(1.0, between / (n * share * (1 - share)))


def tail_bounds(chunks: Sequence[Array], share: float = TAIL) -> tuple[float, float]:
    """One-sided 95 % bounds (lower, upper) of the quantile that ``share`` of the tokens lie above.

    Order statistics: the count above the true quantile is binomial whatever the distribution (Conover 1999, 3.2), over
    the effective number of tokens (:func:`design_effect`). A percentile bootstrap has no such right to the far tail,
    where it can only repeat the largest value it has seen. The upper bound is infinite below 2,995 effective tokens.
    """
    pooled = np.sort(np.concatenate(list(chunks)))[::-1]
    n = len(pooled)
    cut = float(np.quantile(pooled, 1 - share))
    effect = design_effect([c > cut for c in chunks])
    effective = int(n / effect)
    # Fewer than 5 % of samples have so few above the true quantile; so many, likewise.
    few = int(binom.ppf(0.05, effective, share)) - 1
    many = int(binom.isf(0.05, effective, share)) + 1
    upper = math.inf if few < 0 else float(pooled[min(n - 1, int(few * n / effective))])
    lower = float(pooled[min(n - 1, math.ceil(many * n / effective))])
    return lower, upper


def tail_status(above: Sequence[NDArray[np.bool_]]) -> Status:
    """Whether fewer than :data:`TAIL` of the tokens lie above the limit, with 95 % confidence either way.

    The same question as whether the 99.9 % quantile lies below it, asked where it is decided: only tokens above the
    limit count, and only how *they* cluster widens the bound (Clopper-Pearson over the effective number).
    """
    effect = design_effect(above)
    tokens, count = sum(len(a) for a in above), int(sum(a.sum() for a in above))
    n = int(tokens / effect)
    low, high = agreement_bounds(n - math.ceil(count / effect), n)
    return decide(1 - low, 1 - high, TAIL, "lower")


def tail_tokens_needed(exceed: int, tokens: int, effect: float = 1.0) -> int:
    """Tokens from which so many above the limit would bound the tail inside it; 0 if the rate itself is too high."""
    if exceed / tokens >= TAIL:
        return 0
    n = 3000
    while n < 10**8 and binom.cdf(math.ceil(exceed / tokens * n), n, TAIL) > 0.05:
        n = int(n * 1.1)
    return int(n * effect)


def chunks_needed(value: float, bound: float, limit: float, chunks: int) -> int:
    """Chunks from which a mean's bound would reach the limit: its distance shrinks with the root of their number."""
    if value == limit:
        return 0
    return math.ceil(chunks * ((bound - value) / (limit - value)) ** 2) if (bound - value) * (limit - value) > 0 else 0


def _would_decide(status: Status, value: float, bounds: tuple[float, float], limit: float, chunks: int) -> str:
    if status != "INCONCLUSIVE":
        return ""
    bound = bounds[1] if value < limit else bounds[0]
    need = chunks_needed(value, bound, limit, chunks)
    return f"; about {need} chunks of this kind would decide" if need else "; the value lies on the limit"


def _where(chunks: Sequence[NDArray[Any]]) -> str:
    return f"{sum(map(len, chunks))} tokens in {len(chunks)} chunks"


def perplexity_ratio(scores: Sequence[TokenScores], null: Sequence[TokenScores], tier: Tier, seed: int) -> Measurement:
    """Perplexity of the candidate over the baseline's, exp of the mean difference of log-likelihoods.

    Args:
        scores: candidate against baseline, one entry a chunk.
        null: the baseline against itself, possibly fewer chunks.
        tier: the margins.
        seed: of the bootstrap.
    """
    ours, theirs = ([s.nll_candidate - s.nll_baseline for s in side] for side in (scores, null))
    found = _mean("perplexity_ratio", "Perplexity ratio", ours, theirs, tier.ppl_ratio, seed, exp)
    ppl = exp(float(np.mean(np.concatenate([s.nll_baseline for s in scores]))))
    return found.model_copy(update={"detail": f"baseline perplexity {ppl:.4f} over {found.detail}"})


def mean_kld(scores: Sequence[TokenScores], null: Sequence[TokenScores], tier: Tier, seed: int) -> Measurement:
    """Mean KL divergence; arguments as for :func:`perplexity_ratio`."""
    ours, theirs = ([s.kld for s in side] for side in (scores, null))
    found = _mean("mean_kld", "Mean KL divergence", ours, theirs, tier.mean_kld, seed, float)
    status = _suspicious(found.status, found.value, found.null_value)
    return found.model_copy(update={"status": status, "unit": "nats"})


def _mean(
    name: str,
    title: str,
    values: Sequence[Array],
    null: Sequence[Array],
    limit: float,
    seed: int,
    shown: Callable[[float], float],
) -> Measurement:
    """A mean over all tokens with its bootstrap bounds; ``shown`` makes what is compared of it."""
    low, high = map(shown, mean_bounds(values, seed))
    value = shown(float(np.concatenate(values).mean()))
    status = decide(high, low, limit, "lower")
    return Measurement(
        name=name,
        title=title,
        status=status,
        value=value,
        bound=high,
        limit=limit,
        better="lower",
        null_value=shown(float(np.concatenate(null).mean())) if null else None,
        samples=sum(map(len, values)),
        unit="",
        detail=_where(values) + _would_decide(status, value, (low, high), limit, len(values)),
    )


OwnLoss = Callable[[int], Array]
"""KL divergence (nats, ``[tokens]``) of PyTorch in the folder's precision over chunk k."""


def tail_kld(
    scores: Sequence[TokenScores], null: Sequence[TokenScores], tier: Tier, own_loss: OwnLoss | None
) -> Measurement:
    """The 99.9 % quantile of the KL divergence.

    With ``own_loss`` (fp16 and bf16) a tail that does not pass is looked at without the tokens at which PyTorch's own
    loss in this precision explains the candidate's. fp16 loses most where a text starts with a token that the model
    answers with huge activations: on the demo model all tokens beyond fp16's margin lie in the first 25 of one chunk,
    and PyTorch in fp16 loses more at each of them. A token counts against the candidate only where it loses over
    :data:`NULL_RATIO` times what PyTorch does; the margin itself stays.
    """
    kld = [s.kld for s in scores]
    pooled = np.concatenate(kld)
    _, high = tail_bounds(kld)
    null_tail = _tail(np.concatenate([s.kld for s in null])) if null else None
    limit = tier.tail_kld
    status: Status = "REPORTED" if limit is None else tail_status([k > limit for k in kld])
    if limit is not None and (high <= limit) != (status == "PASS"):
        high = math.inf  # this bound of the quantile is too wide to say what the count of tokens says
    detail = f"{_where(kld)}; largest {pooled.max():.2e}"
    shown = _suspicious(status, _tail(pooled), null_tail)
    bound = high if math.isfinite(high) else None
    if limit is not None and own_loss is not None and status != "PASS":
        above, explained, left = _unexplained(scores, own_loss, limit)
        shown, bound = tail_status(left), None
        detail += f"; {above} tokens above the limit, at {explained} of them PyTorch itself loses as much here"
    else:
        detail += _tail_words(status, kld, limit)
    return Measurement(
        name="tail_kld",
        title="99.9 % KL divergence",
        status=shown,
        value=_tail(pooled),
        bound=bound,
        limit=limit,
        better="lower",
        null_value=null_tail,
        samples=len(pooled),
        unit="nats",
        detail=detail,
    )


def _unexplained(
    scores: Sequence[TokenScores], own_loss: OwnLoss, limit: float
) -> tuple[int, int, list[NDArray[np.bool_]]]:
    """Tokens above the limit, those of them that PyTorch's own loss explains, and by chunk which are left."""
    left = []
    above = explained = 0
    for k, s in enumerate(scores):
        over = s.kld > limit
        if over.any():
            fair = over & (s.kld <= NULL_RATIO * own_loss(k))
            above, explained = above + int(over.sum()), explained + int(fair.sum())
            over = over & ~fair
        left.append(over)
    return above, explained, left


def _tail_words(status: Status, kld: Sequence[Array], limit: float | None) -> str:
    if limit is None:
        return ""
    above = [k > limit for k in kld]
    count, tokens = int(sum(a.sum() for a in above)), sum(len(a) for a in above)
    words = f"; {count} tokens above the limit"
    if status == "INCONCLUSIVE":
        need = tail_tokens_needed(count, tokens, design_effect(above))
        words += (
            f", about {need} tokens of this rate would decide" if need else ", more tokens of this rate would not pass"
        )
    return words


def top1_agreement(
    scores: Sequence[TokenScores], null: Sequence[TokenScores], tier: Tier, seed: int, own_loss: OwnLoss | None
) -> Measurement:
    """Share of tokens at which both sides put the same one first.

    With ``own_loss`` (fp16 and bf16) an undecided agreement is looked at without the tokens that differ where PyTorch
    itself loses as much: a token is excused where its KL divergence is at most :data:`NULL_RATIO` times PyTorch's at
    that place. The margin stays, a FAIL stays a FAIL. Chunks are asked in turn until the rest cannot matter: each
    further one could only excuse more. Without it the demo model's fp16 export, which loses less than PyTorch in fp16
    does, stays undecided.
    """
    same = [s.same_top1.copy() for s in scores]
    tokens, agree = sum(map(len, same)), int(sum(x.sum() for x in same))
    low, high = _agreement(same, seed)
    status = decide(low, high, tier.top1, "higher")
    detail = f"{tokens - agree} of {tokens} tokens differ"
    if status == "INCONCLUSIVE":
        need = tokens_needed(tier.top1, agree / tokens)
        if own_loss is not None:
            looked = excused = 0
            for k, s in enumerate(scores):
                if same[k].all():
                    continue
                fair = ~same[k] & (s.kld <= NULL_RATIO * own_loss(k))
                looked, excused = looked + int((~same[k]).sum()), excused + int(fair.sum())
                same[k] = same[k] | fair
                low = _agreement(same, seed)[0]
                if low >= tier.top1:
                    status = "PASS"
                    break
            detail += f", at {excused} of the {looked} looked at PyTorch itself loses as much in this precision"
        if status == "INCONCLUSIVE":
            detail += f"; about {need} tokens would decide" if need else "; more tokens of this rate would not pass"
    return Measurement(
        name="top1_agreement",
        title="Top-1 agreement",
        status=status,
        value=agree / tokens,
        bound=low,
        limit=tier.top1,
        better="higher",
        null_value=float(np.concatenate([s.same_top1 for s in null]).mean()) if null else None,
        samples=tokens,
        unit="",
        detail=f"{detail}; {_where(same)}",
    )


def _agreement(same: Sequence[NDArray[np.bool_]], seed: int) -> tuple[float, float]:
    """Bounds of the agreement: binomial or bootstrap over chunks, whichever is wider.

    A bootstrap of all-equal tokens has no width: the binomial bound says what so many tokens can show.
    """
    exact = agreement_bounds(int(sum(s.sum() for s in same)), sum(map(len, same)))
    boot = mean_bounds([s.astype(np.float64) for s in same], seed)
    return min(exact[0], boot[0]), max(exact[1], boot[1])


NULL_RATIO = 1.5
"""fp16 and bf16 may lose this many times what PyTorch itself loses in that precision (docs/gate.md)."""


def null_ratio(scores: Sequence[TokenScores], null: Sequence[TokenScores], seed: int) -> Measurement:
    """Mean KL divergence over that of PyTorch in the same precision, same windows; bootstrap over chunks, paired."""
    ours = np.asarray([f.kld.sum() for f in scores])
    theirs = np.asarray([f.kld.sum() for f in null])
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(ours), (RESAMPLES, len(ours)))
    ratios = ours[draws].sum(axis=1) / np.maximum(theirs[draws].sum(axis=1), 1e-300)
    low, high = (float(v) for v in np.quantile(ratios, [0.05, 0.95]))
    value = float(ours.sum() / max(theirs.sum(), 1e-300))
    status = decide(high, low, NULL_RATIO, "lower")
    tokens = int(sum(len(f.kld) for f in scores))
    return Measurement(
        name="null_ratio",
        title="Loss over PyTorch's own in this precision",
        status=status,
        value=value,
        bound=high,
        limit=NULL_RATIO,
        better="lower",
        null_value=1.0,
        samples=tokens,
        unit="x",
        detail=f"mean KL divergence {ours.sum() / tokens:.3g} against {theirs.sum() / tokens:.3g} nats, "
        + _where([f.kld for f in scores])
        + _would_decide(status, value, (low, high), NULL_RATIO, len(ours)),
    )
