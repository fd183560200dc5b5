"""Initialisers of a graph read one at a time, from wherever they are stored; nothing stays in memory.

Try: ``python -m pytest tests/bench/gate/test_checks.py -k layout``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from export.quantize import unpack
from runtime.stored_weights import StoredWeight

TORCH_TYPE = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX element types as PyTorch's; what else there is cannot be a weight."""
SMALLEST_SPREAD = 1e-6
"""Of the values of a row: from about half of it on, fp16 scales of 4 bits can be 0."""
HALF_BYTES = {21: 0, 22: 8}
"""ONNX's uint4 and int4, two to a byte, and the code from which on they are negative."""


class TensorReader:
    """Reads initialisers of graphs in one folder.

    Raises:
        ValueError: (from :meth:`tensor`) a type that no weight has, or data cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensor(self, proto: Any) -> Tensor:
        """The initialiser in its own type and shape; 4-bit codes as int8."""
        from onnx import numpy_helper

        if proto.data_type in HALF_BYTES:
            return self._half_bytes(proto)
        kind = TORCH_TYPE.get(proto.data_type)
        if kind is None:
            raise ValueError(f"{proto.name} has ONNX type {proto.data_type}, which no weight here has")
        shape = list(proto.dims)
        if not proto.external_data:
            if proto.raw_data:
                raw = bytearray(proto.raw_data)
            else:
                return torch.from_numpy(numpy_helper.to_array(proto).copy())
        else:
            place = {e.key: e.value for e in proto.external_data}
            nbytes = math.prod(shape) * kind.itemsize
            with (self.folder / place["location"]).open("rb") as f:
                f.seek(int(place.get("offset", 0)))
                raw = bytearray(nbytes)
                if f.readinto(raw) != nbytes:
                    raise ValueError(f"{proto.name}: the data file {place['location']} is cut short")
        return torch.frombuffer(raw, dtype=kind).reshape(shape) if raw else torch.empty(shape, dtype=kind)

    def _half_bytes(self, proto: Any) -> Tensor:
        bytes_of = type(proto)()
        bytes_of.CopyFrom(proto)
        count = math.prod(proto.dims)
        bytes_of.data_type = 2
        bytes_of.dims[:] = [-(-count // 2)]
        codes = unpack(self.tensor(bytes_of).view(1, -1), 4, count).to(torch.int8)
        if half := HALF_BYTES[proto.data_type]:
            codes = torch.where(codes >= half, codes - 2 * half, codes)
        return codes.view(list(proto.dims))

    def weight(self, stored: StoredWeight, tensors: Mapping[str, Any]) -> Tensor:
        """What a stored weight stands for: floats in their own type, codes dequantised to fp32, in its shape.

        Args:
            stored: the weight.
            tensors: the graph's stored tensors by name.

        Raises:
            ValueError: codes and scales that do not fit each other, or a width of codes that is not known.
        """
        found = self.tensor(tensors[stored.name])
        if not stored.bits:
            return found
        rows, columns = stored.shape
        tall, wide = stored.block
        grid = (-(-rows // tall), -(-columns // wide))

        def codes(values: Tensor, rows: int, columns: int) -> Tensor:
            if stored.packed:
                if stored.bits not in (4, 8):
                    raise ValueError(f"{stored.name} has codes of {stored.bits} bits, 4 and 8 are known")
                values = unpack(values.reshape(rows, -1), stored.bits, values.numel() // rows * (8 // stored.bits))
            return values.reshape(rows, -1)[:, :columns].float()

        def spread(values: Tensor) -> Tensor:
            whole = values.reshape(grid).float().repeat_interleave(tall, 0).repeat_interleave(wide, 1)
            return whole[:rows, :columns]

        part = {kind: self.tensor(tensors[name]) for kind, name in stored.parts.items()}
        try:
            value = codes(found, rows, columns)
            zeros = part.get("zero_points")
            if zeros is None:
                value -= stored.middle
            else:
                exact = zeros.dtype.is_floating_point
                value -= spread(zeros if exact else codes(zeros, grid[0], grid[1]))
            value *= spread(part["scales"])
            if "offsets" in part:
                value += spread(part["offsets"].t().contiguous())
        except RuntimeError as e:
            raise ValueError(f"{stored.name}: codes, scales and zero points do not fit each other ({e})") from None
        return value

    def read(self, proto: Any) -> NDArray[Any]:
        """The initialiser as numpy (bf16 widened to fp32)."""
        tensor = self.tensor(proto)
        array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array


def one_valued(value: Tensor, weight: Tensor, step: Tensor | float = 0.0) -> int | None:
    """The first row that is one value throughout where the weight's is not: no quantiser gives up a whole output.

    Rows whose values lie closer together than ``step``, or than fp16 scales can tell apart, say nothing: those of
    tokens that were never trained are as good as 0.
    """
    spread = weight.amax(1) - weight.amin(1)
    floor = torch.as_tensor(step, dtype=spread.dtype).clamp(min=SMALLEST_SPREAD)
    empty = (value == value[:, :1]).all(1) & (spread > floor)
    return int(empty.nonzero()[0]) if empty.any() else None
