"""Greedy choices that part where PyTorch's own rounding moves the distribution as far: no fault of the export.

:func:`bench.gate.statistics.explained_tail` does the same for the tail. Without it the demo model's fp16 export, which
loses less than PyTorch in fp16 does, stays undecided: 42 of 10,189 tokens differ, and PyTorch's own fp16 differs at
more.
Try: ``llama-onnx validate FP16_FOLDER --baseline demo --only top1_agreement``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.gate.statistics import NULL_RATIO, TokenFigures, agreement_bounds, mean_bounds
from reports.record import Check


def explained_agreement(
    check: Check, figures: Sequence[TokenFigures], own_loss: Callable[[int], NDArray[np.float64]], seed: int
) -> Check:
    """An undecided top-1 agreement, without the tokens that differ where PyTorch itself loses as much.

    A token that differs is excused where its KL divergence is at most :data:`bench.gate.statistics.NULL_RATIO` times
    that of PyTorch in the same precision at that place. The margin stays, a FAIL stays a FAIL. Chunks are asked in
    turn until the rest cannot matter: each further one could only excuse more.

    Args:
        check: top-1 agreement as :func:`bench.gate.statistics.teacher_forced_checks` made it.
        figures: candidate against baseline, one entry a chunk.
        own_loss: KL divergence of PyTorch in the same precision over chunk k, ``[tokens]``.
        seed: of the bootstrap, as for the check.
    """
    if check.status != "INCONCLUSIVE" or check.limit is None:
        return check
    same = [f.same_top1.copy() for f in figures]
    differ = sum(int((~s).sum()) for s in same)
    looked = excused = 0
    low = check.bound
    for k, f in enumerate(figures):
        if same[k].all():
            continue
        fair = ~same[k] & (f.kld <= NULL_RATIO * own_loss(k))
        looked, excused = looked + int((~same[k]).sum()), excused + int(fair.sum())
        same[k] = same[k] | fair
        low = _lower(same, seed)
        if low >= check.limit:
            break
    detail = (
        f"{differ} of {check.samples} tokens differ, at {excused} of the {looked} looked at PyTorch itself loses as "
        "much in this precision"
    )
    status = "PASS" if low is not None and low >= check.limit else check.status
    if status != "PASS":
        detail += f"; {check.detail.rpartition('; ')[2]}"
    return check.model_copy(update={"status": status, "bound": low, "detail": detail})


def _lower(same: Sequence[NDArray[np.bool_]], seed: int) -> float:
    """The lower bound of agreement, as the check itself takes it: binomial or bootstrap, whichever is wider."""
    tokens = sum(len(s) for s in same)
    agree = int(sum(s.sum() for s in same))
    return min(agreement_bounds(agree, tokens)[0], mean_bounds([s.astype(np.float64) for s in same], seed)[0])
