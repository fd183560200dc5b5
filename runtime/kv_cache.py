"""The KV cache of one batch.

:class:`SharedCache`: a preallocated buffer per layer for keys and one for values, past and present bound to the same
memory, so GroupQueryAttention and TensorScatter append in place and no token costs a copy. :class:`GrowingCache`: for
graphs that join past and new keys by ``Concat`` (optimum's own), the outputs of one step are the inputs of the next.

onnx is imported only where a helper graph is made for a GPU: an environment of :mod:`bench.runtimes` may lack it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import DTYPE_BYTES, ONNX_TYPE, KVLayout

NUMPY_DTYPE: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
BFLOAT16 = ONNX_TYPE["bf16"]
"""numpy has no such type."""
BLOCK = 64
"""Capacity is rounded up to whole blocks, so that runs of similar length reuse the buffers."""


Loud = tuple[int, float]
"""A token of a past and the factor by which its values count more than the others'."""


def tiled(part: NDArray[Any], length: int, loud: Loud | None = None) -> NDArray[Any]:
    """``[1, heads, n, width]`` tiled to ``length`` tokens, one of which may be ``loud``."""
    repeat = -(-length // part.shape[2])
    whole = np.ascontiguousarray(np.tile(part, (1, 1, repeat, 1))[:, :, :length])
    if loud is not None:
        whole[:, :, loud[0]] *= loud[1]
    return whole


def _slots(capacity: int, window: int | None, device: str) -> int:
    """Slots of a layer whose graph drops what no window reaches any more (``sliding_window_cache``).

    Never fewer than the window. On the CPU the kept tokens move up when the slots are full, so a quarter more of them
    makes that rare; CUDA takes exactly the window.
    """
    if window is None:
        return capacity
    return max(window, min(capacity, window + max(BLOCK, window // 4))) if device == "cpu" else window


class SharedCache:
    """Buffers ``[batch, kv_heads, capacity, head_dim]`` per layer, on the session's device.

    Args:
        layout: from the manifest.
        batch: rows.
        tokens: positions needed per row; the capacity is the next multiple of :data:`BLOCK`, at most ``limit``, or what
            the graph fixes.
        limit: the model's context length.
        device: ``cpu`` or ``cuda``.
        whole: every layer keeps every token, as the scoring graph does.
    """

    def __init__(self, layout: KVLayout, batch: int, tokens: int, limit: int, device: str, whole: bool = False) -> None:
        self.batch = self._rows = batch
        self.capacity = layout.cache_length or min(-(-tokens // BLOCK) * BLOCK, limit)
        self._fixed, self._item_bytes = layout.cache_length is not None, DTYPE_BYTES[layout.dtype]
        self._values: dict[str, Any] = {}
        windows = () if whole else layout.windows
        for layer, window in enumerate(windows or (None,) * layout.layers):
            shape = [batch, layout.kv_heads, _slots(self.capacity, window, device), layout.head_dim]
            for kind in ("key", "value"):
                # Zeroed once: what lies past a row's length has no weight in any attention, but NaNs would spread.
                if layout.dtype == "bf16":
                    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, device, 0)
                else:
                    value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY_DTYPE[layout.dtype]), device, 0)
                self._values[f"{layer}.{kind}"] = value

    def holds(self, batch: int, tokens: int) -> bool:
        """Whether a batch of that size fits without wasting more than half of the buffer."""
        fits = tokens <= self.capacity and (self._fixed or self.capacity <= 2 * max(tokens, BLOCK))
        return self._rows == batch and fits

    def restore(self) -> None:
        """All rows again, after :meth:`keep`; what they hold means nothing."""
        if self.batch != self._rows:
            self._values, self.batch = self._whole, self._rows

    def keep(self, rows: Sequence[int], tokens: int) -> None:
        """Drop every row but these (ascending), of which the first ``tokens`` positions are in use.

        Rows move up inside the buffers, so nothing is allocated and the buffers serve the next batch.
        """
        if self.batch == self._rows:
            self._whole = self._values
        kept = {}
        for name, value in self._whole.items():
            if value.device_name() == "cpu":
                array = value.numpy()  # the same memory
                for to, row in enumerate(rows):
                    if to != row:
                        array[to, :, :tokens] = array[row, :, :tokens]
                kept[name] = ort.OrtValue.ortvalue_from_numpy(array[: len(rows)])
            else:
                kept[name] = select_rows(self._values[name], rows)
        self._values, self.batch = kept, len(rows)

    def lay(self, layer: int, pair: tuple[NDArray[Any], NDArray[Any]], length: int, loud: Loud | None = None) -> None:
        """Fill the first ``length`` positions of one layer of a single row with a short key and value, repeated.

        Args:
            layer: of the model.
            pair: key and value ``[1, kv_heads, some, head_dim]``.
            length: positions.
            loud: a token whose value counts more.
        """
        for kind, part, factor in zip(("key", "value"), pair, (None, loud), strict=True):
            self._values[f"{layer}.{kind}"].numpy()[:, :, :length] = tiled(part, length, factor)  # the same memory

    def bind(self, binding: Any) -> None:
        """Bind every buffer as past and as present."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)

    def bind_row(self, binding: Any, row: int) -> None:
        """The same for one row alone, a batch of 1 inside the same memory."""
        for name, value in self._values.items():
            shape = [1, *value.shape()[1:]]
            kind = value.element_type()
            at = value.data_ptr() + row * math.prod(shape) * self._item_bytes
            device = value.device_name()
            binding.bind_input(f"past_key_values.{name}", device, 0, kind, shape, at)
            binding.bind_output(f"present.{name}", device, 0, kind, shape, at)

    def taken(self, _binding: Any) -> None:
        """After a run: nothing to do, the present is where the past was."""


class GrowingCache:
    """Keys and values ``[batch, kv_heads, tokens so far, head_dim]`` per layer, allocated anew by each run.

    Args:
        layout: from the manifest.
        batch: rows.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, layout: KVLayout, batch: int, device: str) -> None:
        self._device = device
        empty = np.zeros((batch, layout.kv_heads, 0, layout.head_dim), NUMPY_DTYPE[layout.dtype])
        names = [f"{layer}.{kind}" for layer in range(layout.layers) for kind in ("key", "value")]
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(empty, device, 0) for name in names}

    def keep(self, rows: Sequence[int], _tokens: int) -> None:
        """Drop every row but these."""
        self._values = {name: select_rows(value, rows) for name, value in self._values.items()}

    def bind(self, binding: Any) -> None:
        """Bind the past; the present is allocated by the run."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_output(f"present.{name}", self._device)

    def taken(self, binding: Any) -> None:
        """After a run: its present is the next one's past. The cache must have been bound before other outputs."""
        self._values = dict(zip(self._values, binding.get_outputs(), strict=False))


def select_rows(value: Any, rows: Sequence[int]) -> Any:
    """A new OrtValue on the same device with these rows of ``value``; the data do not leave the device."""
    device = value.device_name().lower()
    if device == "cpu":
        return ort.OrtValue.ortvalue_from_numpy(value.numpy()[list(rows)])
    index = ort.OrtValue.ortvalue_from_numpy(np.asarray(rows, np.int64), device, 0)
    return _ran(_gather(value.element_type(), device), {"data": value, "rows": index}, "kept", device)


@cache
def _gather(element_type: int, device: str) -> Any:
    """A session that takes rows of a 4-dimensional tensor of that ONNX element type."""
    from onnx import TensorProto, helper

    data = helper.make_tensor_value_info("data", element_type, ["b", "h", "t", "d"])
    rows = helper.make_tensor_value_info("rows", TensorProto.INT64, ["n"])
    kept = helper.make_tensor_value_info("kept", element_type, ["n", "h", "t", "d"])
    graph = helper.make_graph([helper.make_node("Gather", ["data", "rows"], ["kept"])], "rows", [data, rows], [kept])
    return small_session(graph, device)


def to_fp32(value: Any, device: str) -> NDArray[np.float32]:
    """A 3-dimensional bfloat16 OrtValue as fp32 on the host; converted on the device."""
    wide: NDArray[np.float32] = _ran(_widen(device), {"narrow": value}, "wide", "cpu").numpy()
    return wide


@cache
def _widen(device: str) -> Any:
    from onnx import TensorProto, helper

    narrow = helper.make_tensor_value_info("narrow", TensorProto.BFLOAT16, ["a", "b", "c"])
    wide = helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["a", "b", "c"])
    node = helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT)
    return small_session(helper.make_graph([node], "widen", [narrow], [wide]), device)


def _ran(session: Any, inputs: dict[str, Any], output: str, device: str) -> Any:
    """The one output of a small session over OrtValues, left on ``device``."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(output, device)
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0]


def small_session(graph: Any, device: str) -> Any:
    """A session over a helper graph of a few nodes, on the ``cpu`` or on ``cuda``."""
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), sess_options=options, providers=providers)
    session.disable_fallback()
    return session
