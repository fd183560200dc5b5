"""Checks that compute: teacher-forced statistics, and what teacher forcing misses.

Each stands for a way in which a graph with the right attributes could still be wrong on this runtime, and for folders
made elsewhere they are all there is. Figures and bounds are :mod:`bench.gate.statistics`'s.
Try: ``llama-onnx validate FOLDER --baseline demo --only mean_kld,long_context``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.gate.explained import explained_agreement
from bench.gate.statistics import TokenFigures, explained_tail, kld_rows, null_ratio_check, teacher_forced_checks
from bench.gate.subject import SEED, Found, Subject
from bench.gate.units import score
from reports.record import Check
from reports.validation import Finding, worst
from runtime.trim import trim

LEAST_TAIL = 2995
"""Tokens from which no exceedance at all bounds the 99.9 % quantile with 95 % confidence: ln 0.05 / ln 0.999."""


def _one(name: str) -> Callable[[Subject], Found]:
    """A check that shows one figure of the teacher-forced comparison."""

    def run(s: Subject) -> Found:
        if not s.windows:
            return Found("SKIPPED", "the dataset has no prose to score")
        found = next(c for c in teacher_forced(s) if c.name == name)
        short = s.manifest.precision in ("fp16", "bf16")
        if name == "tail_kld" and short and s.tier.tail_kld is not None:
            found = explained_tail(found, s.figures, lambda k: _own_loss(s, k), s.tier.tail_kld)
            s.baseline.drop_nulls()
        if name == "top1_agreement" and short and s.mode.judges_tails:
            found = explained_agreement(found, s.figures, lambda k: _own_loss(s, k), SEED)
            s.baseline.drop_nulls()
        if not s.mode.judges_tails and name in ("tail_kld", "top1_agreement"):
            status = "FAIL" if found.status == "FAIL" else "REPORTED"
            found = found.model_copy(update={"status": status})
        return of_figures([found])

    return run


def teacher_forced(s: Subject) -> list[Check]:
    """The four figures over every window, computed once for a subject."""
    cached = s.__dict__.get("_teacher_forced")
    if cached is None:
        cached = teacher_forced_checks(s.figures, null_figures(s), s.tier, SEED)
        s.__dict__["_teacher_forced"] = cached
    found: list[Check] = cached
    return found


def null_figures(s: Subject) -> list[TokenFigures]:
    """PyTorch in the folder's own precision (fp32: with another attention kernel) against fp32, same windows."""
    cached = s.__dict__.get("_null")
    if cached is None:
        kind = s.manifest.activations if s.manifest.activations != "fp32" else "eager"
        cached = score(s, kind, s.windows[: s.mode.null_windows])
        s.baseline.drop_nulls()
        s.__dict__["_null"] = cached
    found: list[TokenFigures] = cached
    return found


def _own_loss(s: Subject, k: int) -> NDArray[np.float64]:
    """What PyTorch in the folder's precision loses over one window, ``[tokens]``."""
    null = null_figures(s)
    if k < len(null):
        return null[k].kld
    return score(s, s.manifest.activations, [s.windows[k]])[0].kld


def of_figures(figures: Sequence[Check], findings: Sequence[Finding] = ()) -> Found:
    """The worst status decides; the line shows each figure with bound and limit."""
    status = worst([c.status for c in figures])
    words = []
    for c in figures:
        bound = "" if c.bound is None else f", bound {c.bound:.4g}"
        limit = "" if c.limit is None else f", limit {c.limit:g}"
        null = "" if c.null_value is None else f", null {c.null_value:.3g}"
        words.append(f"{c.value:.6g}{bound}{limit}{null}")
    line = "; ".join(words)
    if status in ("FAIL", "INCONCLUSIVE"):
        line += f" ({next(c.detail for c in figures if c.status == status)})"
    return Found(status, line, findings=findings, figures=figures)


perplexity_ratio = _one("perplexity_ratio")
mean_kld = _one("mean_kld")
tail_kld = _one("tail_kld")
top1_agreement = _one("top1_agreement")


def null_ratio(s: Subject) -> Found:
    """fp16 and bf16: mean KL divergence at most 1.5 times what PyTorch itself loses in that precision."""
    if s.manifest.activations == "fp32" or s.manifest.precision not in ("fp16", "bf16"):
        return Found("SKIPPED", "judged for fp16 and bf16 only")
    if not s.windows:
        return Found("SKIPPED", "the dataset has no prose to score")
    null = null_figures(s)
    check = null_ratio_check(s.figures[: len(null)], null, SEED)
    if not s.mode.judges_tails and check.status == "INCONCLUSIVE":
        check = check.model_copy(update={"status": "REPORTED"})
    return of_figures([check])


# -- what teacher forcing misses -------------------------------------------------------------------------------------


def _kld_check(
    s: Subject, name: str, title: str, rows: Sequence[tuple[str, float]], limit: float, detail: str
) -> Found:
    """The largest of several KL divergences against a limit; the finding names the place."""
    place, value = max(rows, key=lambda r: r[1] if np.isfinite(r[1]) else np.inf)
    good = bool(np.isfinite(value) and value <= limit)
    check = Check(
        name=name,
        title=title,
        status="PASS" if good else "FAIL",
        value=max(value, 0.0),
        bound=None,
        limit=limit,
        better="lower",
        null_value=None,
        samples=len(rows),
        unit="nats",
        detail=f"{detail}; largest at {place}",
    )
    findings = [] if good else [Finding(where=place, what=f"KL divergence {value:.3g} nats, limit {limit:g}")]
    line = f"{value:.3g} nats at {place}, limit {limit:g} ({len(rows)} places)"
    return Found(check.status, line, findings=findings, figures=[check])


def _text(s: Subject, length: int) -> list[int]:
    """Ids of the dataset's prose, as many as asked for if there are so many, and a few less than the context."""
    length = min(length, s.manifest.context_length - 4)
    out: list[int] = []
    for window in s.windows:
        out += window
        if len(out) >= length:
            break
    return out[:length]


def prefill_logits(s: Subject) -> Found:
    """The decode graph's own prefill against the baseline at several prompt lengths, one token included."""
    text = _text(s, 200)
    rows = []
    for n in sorted({1, 2, 17, min(64, len(text)), len(text)}):
        ours = s.candidate.prefill([text[:n]], reserve=0)[0].copy()
        rows.append((f"prompt of {n}", float(kld_rows(ours[None], s.baseline.score(text[:n])[-1:])[0])))
    return _kld_check(s, "prefill_logits", "Logits of prefill", rows, s.tail_limit, "candidate against baseline")


def decode_steps(s: Subject) -> Found:
    """Steps over the KV cache against the baseline's one pass, from an early and a late start."""
    text = _text(s, 160)
    whole = s.baseline.score(text)
    rows = []
    for start, steps in ((3, 12), (len(text) - 25, 24))[: s.mode.places]:
        if start < 1 or start + steps > len(text):
            continue
        logits = s.candidate.prefill([text[:start]], reserve=steps).copy()
        for k in range(steps):
            logits = s.candidate.step([text[start + k]])
            rows.append((f"step {k + 1} behind {start}", float(kld_rows(logits, whole[start + k][None])[0])))
    if not rows:
        return Found("SKIPPED", "the dataset's prose is too short")
    return _kld_check(s, "decode_steps", "Step-by-step decode", rows, s.tail_limit, "cache against one pass")


UNPROBED = "a bf16 cache cannot be laid together: numpy has no such type"


def chunked_prefill(s: Subject) -> Found:
    """A prompt in three chunks over the cache against the same prompt in one piece."""
    if s.manifest.kv.dtype == "bf16":
        return Found("SKIPPED", UNPROBED)
    text = _text(s, 120)
    if len(text) < 12:
        return Found("SKIPPED", "the dataset's prose is too short")
    whole = s.baseline.score(text)
    cuts = [0, len(text) // 2, len(text) // 2 + 5, len(text)]
    names = ["logits", *s.probe.present_names]
    past = None
    rows = []
    for a, b in itertools.pairwise(cuts):
        found = s.probe.run(text[a:b], past, names)
        past = s.probe.presents(found)
        logits = found["logits"][0].astype(np.float32)
        klds = kld_rows(logits, whole[b - len(logits) : b])
        rows.append((f"tokens {b - len(logits)} to {b}", float(klds.max())))
    return _kld_check(s, "chunked_prefill", "Chunked prefill", rows, s.tail_limit, "three chunks against one piece")


def batch_rows(s: Subject) -> Found:
    """Every row of uneven batches in several orders, prefill and two steps, against the baseline's row alone."""
    text = _text(s, 100)
    lengths = [len(text) - 3, 2, len(text) // 2, len(text) // 4, 1]
    lengths = [max(1, n) for n in lengths]
    whole = s.baseline.score(text)
    rows = []
    orders = {"as given": lengths, "shortest first": sorted(lengths), "longest first": sorted(lengths)[::-1]}
    for title, order in list(orders.items())[: s.mode.places]:
        logits = s.candidate.prefill([text[:n] for n in order], reserve=2).copy()
        for step in range(3):
            wanted = np.stack([whole[n - 1 + step] for n in order])
            rows += [
                (f"{title}, row {i} of {order[i]} tokens, step {step}", float(v))
                for i, v in enumerate(kld_rows(logits, wanted))
            ]
            if step < 2:
                logits = s.candidate.step([text[n + step] for n in order]).copy()
    return _kld_check(s, "batch_rows", "Uneven batches", rows, s.tail_limit, "three orders, prefill and two steps")


def long_context(s: Subject) -> Found:
    """Positions at the end of the context and around the original rope context, behind a past laid together."""
    if s.manifest.kv.dtype == "bf16":
        return Found("SKIPPED", UNPROBED)
    config = s.baseline.config
    end = s.manifest.context_length
    text, new = _text(s, 64), 16
    tail = _text(s, 96)[-new:]
    scaling = getattr(config, "rope_scaling", None) or {}
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type", scaling.get("type")) in (None, "default", "dynamic"):
        original = None
    places = {"the end of the context": end - new, "the middle of the context": end // 2}
    if original and original + new < end:
        places["the original rope context"] = int(original) - new // 2
    rows = []
    for title, length in list(places.items())[: None if original else s.mode.places]:
        if length < 1:
            continue
        first, wanted = s.baseline.continued(text, length, tail)
        trim()  # the past is in memory once at a time
        logits = s.probe.behind(tail, first, length).astype(np.float32)
        klds = kld_rows(logits, wanted[-len(logits) :])
        # The mean over the new tokens: a past laid together is no text, its single places are rougher than a text's.
        rows.append((f"{title} (from {length:,})", float(klds.mean())))
    if not rows:
        return Found("SKIPPED", "the context is too short")
    return _kld_check(s, "long_context", "Long context", rows, s.tail_limit, f"mean of {new} tokens behind a long past")


def determinism(s: Subject) -> Found:
    """The same prompt and step twice give the same bits."""
    text = _text(s, 60)

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
