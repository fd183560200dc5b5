"""The KV cache of one batch.

:class:`SharedCache`: a preallocated buffer per layer for keys and one for values, past and present bound to the same
memory, so GroupQueryAttention appends in place and no token costs a copy. :class:`GrowingCache`: for graphs that join
past and new keys by ``Concat`` (target ``tensorrt``, optimum's own graphs), the outputs of one step are the inputs of
the next.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from export.manifest import KVLayout

NUMPY_DTYPE: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
_BFLOAT16 = 16
"""Number of bfloat16 among ONNX's element types; numpy has no such type."""
BLOCK = 64
"""Capacity is rounded up to whole blocks, so that runs of similar length reuse the buffers."""


class SharedCache:
    """Buffers ``[batch, kv_heads, capacity, head_dim]`` per layer, on the session's device.

    Args:
        layout: from the manifest.
        batch: rows.
        tokens: positions needed per row; the capacity is the next multiple of :data:`BLOCK`, at most ``limit``.
        limit: the model's context length.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, layout: KVLayout, batch: int, tokens: int, limit: int, device: str) -> None:
        self.batch = batch
        self.capacity = min(-(-tokens // BLOCK) * BLOCK, limit)
        shape = [batch, layout.kv_heads, self.capacity, layout.head_dim]
        self._values: dict[str, Any] = {}
        for layer in range(layout.layers):
            for kind in ("key", "value"):
                # Zeroed once: GroupQueryAttention never reads past a row's length, but NaNs there would spread.
                if layout.dtype == "bf16":
                    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, _BFLOAT16, device, 0)
                else:
                    value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY_DTYPE[layout.dtype]), device, 0)
                self._values[f"{layer}.{kind}"] = value
        self.nbytes = batch * self.capacity * layout.bytes_per_token()

    def holds(self, batch: int, tokens: int) -> bool:
        """Whether a batch of that size fits without wasting more than half of the buffer."""
        return self.batch == batch and tokens <= self.capacity <= 2 * max(tokens, BLOCK)

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
            at = value.data_ptr() + row * math.prod(shape) * (4 if kind == TensorProto.FLOAT else 2)
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
        self._per_token = batch * layout.bytes_per_token()
        self._tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._per_token * self._tokens

    def bind(self, binding: Any) -> None:
        """Bind the past; the present is allocated by the run."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_output(f"present.{name}", self._device)

    def taken(self, binding: Any) -> None:
        """After a run: its present is the next one's past. The cache must have been bound before other outputs."""
        outputs = binding.get_outputs()
        self._values = dict(zip(self._values, outputs, strict=False))
        self._tokens = outputs[0].shape()[2]
