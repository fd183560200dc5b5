"""One product on ONNX Runtime: the right one, in the type and on the provider that were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.errors import SessionError
from runtime.matrix_product import MatrixProduct
from runtime.settings import SessionSettings


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_it_is_the_product_of_both_sides(dtype: str, tolerance: float) -> None:
    rng, kind = np.random.default_rng(0), {"fp32": np.float32, "fp16": np.float16}[dtype]
    right, left = (rng.standard_normal(shape, np.float32).astype(kind) for shape in ((24, 40), (3, 24)))
    found = MatrixProduct(3, 24, 40, dtype, SessionSettings(threads=1)).result()
    assert found.dtype == kind
    expected = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 10)


def test_each_run_computes_it_anew() -> None:
    product = MatrixProduct(3, 24, 40, "fp32", SessionSettings(threads=1))
    first: Any = product.result().copy()
    product.result()[:] = 0
    product.run()
    assert (product.result() == first).all()


def test_a_product_that_the_provider_lacks_is_an_error_of_ours() -> None:
    with pytest.raises(SessionError, match=r"cannot open a graph: .*MatMul"):
        MatrixProduct(3, 24, 40, "bf16", SessionSettings(threads=1))
