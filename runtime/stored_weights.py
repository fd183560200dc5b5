"""What a graph's stored tensors stand for: float weights as they are, and codes with the scales that some operator
multiplies them by, whichever tool quantised them.

No value is read here. The precision of a third-party export follows from it, and the weight audit reads values by it.
Try: ``python -m pytest tests/bench/gate/test_by_content.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.manifest import ONNX_TYPE, standard

FLOATS = {number: name for name, number in ONNX_TYPE.items()} | {11: "fp64"}
CODE_BITS = {2: 8, 3: 8, 21: 4, 22: 4}
"""ONNX element types of codes (uint8, int8, uint4, int4) and their bits."""
LEAST = 8
"""A tensor of so many elements or fewer is a constant of the computation, not a weight."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight that a graph computes with.

    Attributes:
        name: the initialiser of its values, or of its codes.
        kind: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; ``int2``, ``int4`` or ``int8`` where it is codes.
        shape: of the weight.
        block: rows and columns that share a scale; ``(0, 0)`` for floats.
        parts: initialisers by what they hold: ``scales``, ``zero_points``, ``offsets`` (``[blocks, rows]``, added to
            the weight).
        packed: whether its codes are bytes of which each holds several.
        middle: the zero point where none is stored.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int] = (0, 0)
    parts: Mapping[str, str] = field(default_factory=dict)
    packed: bool = False
    middle: int = 0

    @property
    def bits(self) -> int:
        """Of a code; 0 for floats."""
        return int(self.kind.removeprefix("int")) if self.kind.startswith("int") else 0

    @property
    def elements(self) -> int:
        """Numbers in the weight."""
        return math.prod(self.shape)


def stored_weights(model: Any, leaves: Mapping[str, Any]) -> list[StoredWeight]:
    """Every weight of a graph: quantised ones by the operators that read their codes, then each other float tensor.

    Args:
        model: ``onnx.ModelProto``; its external data are not needed.
        leaves: stored tensors (``onnx.TensorProto``) by the names they are read by.
    """
    found = {w.name: w for w in _quantised(model, leaves)}
    taken = {part for w in found.values() for part in w.parts.values()} | found.keys()
    for name, tensor in leaves.items():
        if name not in taken and tensor.data_type in FLOATS and math.prod(tensor.dims) > LEAST:
            found[name] = StoredWeight(name, FLOATS[tensor.data_type], tuple(tensor.dims))
    return list(found.values())


def _quantised(model: Any, leaves: Mapping[str, Any]) -> Iterator[StoredWeight]:
    makers = {name: node for node in model.graph.node for name in node.output if name}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        names = [*node.input, *[""] * 8]
        own = standard(node.domain) == ""
        numbers = {a.name: a.i for a in node.attribute}
        found = None
        if node.op_type == "MatMulNBits" and names[1] in leaves:
            found = _nbits(node, names, numbers)
            offsets = _offsets(node, readers, makers, leaves)
            found["parts"] |= {"offsets": offsets} if offsets else {}
        elif node.op_type == "GatherBlockQuantized" and names[0] in leaves:
            found = _gathered(names, numbers, leaves)
        elif node.op_type == "DequantizeLinear":
            codes = names[0]
            if codes not in leaves and codes in makers and makers[codes].op_type == "Gather":
                codes = makers[codes].input[0]  # rows of a table, all of one scale
            found = _linear(codes, names[1], names[2], numbers.get("axis", 1), numbers.get("block_size", 0), leaves)
        elif node.op_type == "MatMulInteger" and own:
            found = _linear(names[1], _scale_after(node, readers, makers, leaves), names[3], -1, 0, leaves)
        elif node.op_type == "DynamicQuantizeMatMul":
            found = _linear(names[1], names[2], names[3], -1, 0, leaves)
        elif node.op_type == "MatMulIntegerToFloat":
            found = _linear(names[1], names[3], names[5], -1, 0, leaves)
        if found is not None:
            found["parts"] = {kind: name for kind, name in found["parts"].items() if name in leaves}
            if "scales" in found["parts"]:
                yield StoredWeight(**found)


def _nbits(node: Any, names: list[str], numbers: dict[str, int]) -> dict[str, Any]:
    bits = numbers.get("bits", 4)
    return {
        "name": names[1],
        "kind": f"int{bits}",
        "shape": (numbers["N"], numbers["K"]),
        "block": (1, numbers["block_size"]),
        "parts": {"scales": names[2], "zero_points": names[3]},
        "packed": True,
        "middle": 2 ** (bits - 1),
    }


def _gathered(names: list[str], numbers: dict[str, int], leaves: Mapping[str, Any]) -> dict[str, Any]:
    codes = leaves[names[0]]
    bits = numbers.get("bits", 4) if codes.data_type == 2 else CODE_BITS.get(codes.data_type, 8)
    packed = codes.data_type == 2
    width = codes.dims[-1] * (8 // bits) if packed else codes.dims[-1]
    return {
        "name": names[0],
        "kind": f"int{bits}",
        "shape": (math.prod(codes.dims[:-1]), width),
        "block": (1, numbers.get("block_size", 128)),
        "parts": {"scales": names[2], "zero_points": names[3]},
        "packed": packed,
        "middle": 2 ** (bits - 1) if packed else 0,
    }


def _linear(
    codes: str, scales: str, zeros: str, axis: int, block: int, leaves: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Codes of one scale, of a scale for each entry of an axis, or for each block along it; None for another form."""
    if codes not in leaves or scales not in leaves or leaves[codes].data_type not in CODE_BITS:
        return None
    shape = tuple(leaves[codes].dims)
    if len(shape) != 2:
        return None
    scale, axis = leaves[scales], axis % 2
    if block:
        sizes = [1, 1]
        sizes[axis] = block
    elif math.prod(scale.dims) == 1:
        sizes = list(shape)
    else:
        sizes = list(shape)
        sizes[axis] = 1
    return {
        "name": codes,
        "kind": f"int{CODE_BITS[leaves[codes].data_type]}",
        "shape": shape,
        "block": tuple(sizes),
        "parts": {"scales": scales, "zero_points": zeros},
    }


def _offsets(node: Any, readers: Mapping[str, Any], makers: Mapping[str, Any], leaves: Mapping[str, Any]) -> str:
    """The stored second factor of a product that is added to this one's: real zero points beside integer codes."""
    after = readers.get(node.output[0], [])
    if len(after) != 1 or after[0].op_type != "Add":
        return ""
    other = next((makers.get(n) for n in after[0].input if n != node.output[0]), None)
    if other is None or other.op_type != "MatMul" or other.input[1] not in leaves:
        return ""
    sizes = {a.name: a.i for a in node.attribute}
    wanted = [-(-sizes["K"] // sizes["block_size"]), sizes["N"]]
    return str(other.input[1]) if list(leaves[other.input[1]].dims) == wanted else ""


def _scale_after(node: Any, readers: Mapping[str, Any], makers: Mapping[str, Any], leaves: Mapping[str, Any]) -> str:
    """The weight's scale that an integer product is multiplied by, together with the input's.

    ``onnxruntime.quantization`` writes ``MatMulInteger``, ``Cast``, ``Mul`` by ``Mul(input scale, weight scale)``.
    """
    value = node.output[0]
    for _ in range(3):
        after = readers.get(value, [])
        if len(after) != 1:
            return ""
        if after[0].op_type == "Mul":
            other = next((makers.get(n) for n in after[0].input if n != value), None)
            names = other.input if other is not None and other.op_type == "Mul" else after[0].input
            return next((str(n) for n in names if n in leaves), "")
        value = after[0].output[0]
    return ""
