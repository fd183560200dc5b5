"""How far two right runtimes may differ: in one node over equal inputs, and at the end of a whole graph.

Every number is some times what the public versions 1.23.2, 1.27 and 1.32 show against each other over the demo model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"float32": 1e-5, "float64": 1e-5, "float16": 2e-3}
"""Relative error of one node over equal inputs, by the type that comes out: a hundred units of the last place in fp32,
two to four in fp16, whose products are summed in fp32 by one version and in fp16 by another."""
SHORT_SUM = 64
"""Terms of a sum up to which :data:`TYPES` holds; beyond, rounding grows with the root of their number."""
CODES = 2e-2
"""MatMulNBits with ``accuracy_level`` 4 rounds activations to 8 bits, in blocks that differ by version: codes flip."""
WHOLE = {"float32": 2e-4, "float64": 2e-4, "float16": 4e-2}
"""Relative error of a whole graph's outputs: every layer adds its own, and softmax makes what went in grow. Over 30
layers and 1,000 tokens 1.2e-5 and 1e-2 were seen."""
WHOLE_CODES = 0.6
"""The same where weights are codes: a last bit of an activation flips a code of 8 bits, and 30 layers made 0.17 of it
between two versions whose nodes agree to 7e-3, each on equal inputs."""
SPREAD = 8.0
"""How far a single element may be off, in limits: the largest of some thousand normal errors is about 5 times their
root mean square, and one element of a row can be wrong without moving the row's norm."""
SMALL = 0.1
"""A row shorter than this part of the median is measured by that: its own norm is what a cancellation left."""
LARGE = 1e18
"""Whose square fp32 does not hold: masks have such values."""


def gap(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Largest relative error of rows ``[n, width]``: of a row by norm, or of one element by ``SPREAD``.

    Whole numbers are equal (0) or not (inf); codes of 8 bits may be off by one, they were rounded.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not ours.size:
        return 0.0
    if ours.dtype.kind != "f":
        slack = 1 if ours.dtype.itemsize == 1 and ours.dtype.kind in "iu" else 0
        return 0.0 if (np.abs(ours.astype(np.int64) - theirs.astype(np.int64)) <= slack).all() else float("inf")
    a: NDArray[Any] = ours.astype(np.promote_types(ours.dtype, np.float32))
    b: NDArray[Any] = theirs.astype(a.dtype)
    finite = np.isfinite(b)
    if not finite.all():
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    if not np.isfinite(a).all():
        return float("inf")
    if max(a.max(), b.max(), -a.min(), -b.min()) > LARGE:
        a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(b, axis=-1)
    norms = np.maximum(norms, max(SMALL * float(np.median(norms)), 1e-30))
    error = np.abs(a - b)
    rows = float((np.linalg.norm(error, axis=-1) / norms).max())
    usual = norms / np.sqrt(b.shape[-1])
    return max(rows, float((error / (usual[:, None] + np.abs(b))).max()) / SPREAD)


PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
CODED = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "DynamicQuantizeLinear")
"""Operators over activations of 8 bits."""


def usual(dtype: Any) -> float:
    """Of one node's result of that type; whole numbers are exact."""
    return TYPES.get(str(dtype), 0.0)


def limit_of_node(op_type: str, level: int, dtype: Any, terms: int) -> float:
    """Relative error up to which a node is right.

    Args:
        op_type: of the node.
        level: ``accuracy_level`` that its product is computed with, 0 for none.
        dtype: of its result.
        terms: of its longest sum.
    """
    if op_type in CODED or (op_type in PRODUCTS and level == 4):
        return CODES
    base = usual(dtype)
    return base * max(1.0, terms / SHORT_SUM) ** 0.5 if str(dtype) != "float16" else base


def limit_of_graph(dtype: Any, quantised: bool) -> float:
    """Relative error of a whole graph's output up to which only its parts can show that it is wrong."""
    return WHOLE_CODES if quantised else WHOLE.get(str(dtype), 0.0)
