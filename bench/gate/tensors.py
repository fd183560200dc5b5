"""Initialisers of a graph read one at a time, from wherever they are stored; nothing stays in memory.

Try: ``python -m pytest tests/bench/gate/test_checks.py -k layout``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

TORCH_TYPE = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    16: torch.bfloat16,
}
"""ONNX element types as PyTorch's; what else there is cannot be a weight."""


class TensorReader:
    """Reads initialisers of graphs in one folder.

    Raises:
        ValueError: (from :meth:`tensor`) a type that no weight has, or data cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensor(self, proto: Any) -> Tensor:
        """The initialiser in its own type and shape."""
        from onnx import numpy_helper

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

    def read(self, proto: Any) -> NDArray[Any]:
        """The initialiser as numpy (bf16 widened to fp32)."""
        tensor = self.tensor(proto)
        array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array
