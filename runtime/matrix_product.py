"""One plain matrix product on ONNX Runtime: how fast the products of a prefill can be at best.

Try: ``python -c "from runtime.matrix_product import MatrixProduct, SessionSettings as S;
MatrixProduct(512, 576, 1536, 'fp32', S(threads=2)).run()"``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import ONNX_TYPE
from runtime.kv_cache import BFLOAT16, NUMPY_DTYPE
from runtime.probe import open_graph
from runtime.providers import PROVIDERS
from runtime.settings import SessionSettings


class MatrixProduct:
    """``[rows, inner] x [inner, outer]``; the right side is a constant, as a weight is, so ONNX Runtime may pack it.

    Args:
        rows, inner, outer: the sizes.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        settings: provider, threads, options.

    Raises:
        ProviderUnavailableError: the provider does not load here.
        SessionError: it has no such product.
    """

    def __init__(self, rows: int, inner: int, outer: int, dtype: str, settings: SessionSettings) -> None:
        from onnx import helper

        rng, kind = np.random.default_rng(0), ONNX_TYPE[dtype]
        weight = _as(rng.standard_normal((inner, outer), np.float32), dtype)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", kind, [rows, inner])],
            [helper.make_tensor_value_info("y", kind, [rows, outer])],
            [helper.make_tensor("w", kind, [inner, outer], weight.tobytes(), raw=True)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        self._session = open_graph(model.SerializeToString(), settings)
        left = _as(rng.standard_normal((rows, inner), np.float32), dtype)
        self._left = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(left, kind)
        device = PROVIDERS[settings.provider].device
        self._product = ort.OrtValue.ortvalue_from_shape_and_type([rows, outer], kind, device, 0)
        self._binding: Any = self._session.io_binding()
        self._binding.bind_ortvalue_input("x", self._left)  # a GPU provider copies it here, once
        self._binding.bind_ortvalue_output("y", self._product)
        self.run()

    def run(self) -> None:
        """Once; returns when it is done."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def result(self) -> Any:
        """What the last run gave ``[rows, outer]``; fp32 and fp16 only."""
        return self._product.numpy()


def _as(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """In a type of numpy's own; bf16, which it lacks, as its bits."""
    if ONNX_TYPE[dtype] == BFLOAT16:
        bits: NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits
    return values.astype(NUMPY_DTYPE[dtype])
