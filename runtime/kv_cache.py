"""The KV cache of one batch: a preallocated buffer per layer for keys and one for values.

Past and present are bound to the same memory, so GroupQueryAttention appends in place and no token costs a copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from export.manifest import KVLayout

NUMPY_DTYPE: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
BLOCK = 64
"""Capacity is rounded up to whole blocks, so that runs of similar length reuse the buffers."""


class KVCache:
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
        dtype = NUMPY_DTYPE[layout.dtype]
        self._values: dict[str, Any] = {}
        for layer in range(layout.layers):
            for kind in ("key", "value"):
                # Zeroed once: GroupQueryAttention never reads past a row's length, but NaNs there would spread.
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
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
