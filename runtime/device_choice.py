"""Small graphs that choose the next tokens where the logits are, and lengthen the mask for them.

:func:`choice_session` takes the argmax, or draws with temperature, top-k and top-p exactly as
:func:`runtime.sampling.drawn` does: the random numbers are an input, so that the host's generators give them and one
number and one id a row are all that crosses. Standard operators only, in fp64 as on the host.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from runtime.kv_cache import small_session

_ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}


def element_type(logits_type: str) -> int:
    """ONNX's number of a type as ONNX Runtime names it, such as ``tensor(float16)``."""
    return _ELEMENTS[logits_type]


@cache
def choice_session(logits_type: str, device: str, draws: bool, top_k: bool = False, top_p: bool = False) -> Any:
    """``logits [b, 1, v], lengths [b, 1], places [1, c] -> ids [b, 1], mask [b, c], longer [b, 1]``.

    ``lengths`` counts the tokens in the cache; the mask also covers the token that was just chosen.

    Args:
        logits_type: as ONNX Runtime names it.
        device: ``cpu`` or ``cuda``.
        draws: also takes ``numbers [b, 1]`` (in [0, 1)) and ``temperature [1]``, both fp64, and draws; else the argmax.
        top_k: also takes ``top_k [1]`` int64, at most v; ties at its edge are all kept.
        top_p: also takes ``top_p [1]`` fp64.
    """
    whole, double = TensorProto.INT64, TensorProto.DOUBLE

    def value(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        value("logits", element_type(logits_type), "b", 1, "v"),
        value("lengths", whole, "b", 1),
        value("places", whole, 1, "c"),
    ]
    nodes = _Nodes()
    if draws:
        inputs += [value("numbers", double, "b", 1), value("temperature", double, 1)]
        inputs += [value("top_k", whole, 1)] if top_k else []
        inputs += [value("top_p", double, 1)] if top_p else []
        _draw(nodes, top_k, top_p)
    else:
        nodes.add("Cast", "logits", to=TensorProto.FLOAT, out="wide")
        nodes.add("ArgMax", "wide", axis=2, keepdims=0, out="ids")
    nodes.add("Add", "lengths", nodes.whole(1), out="longer")
    nodes.add("Cast", nodes.add("Less", "places", "longer"), to=whole, out="mask")
    outputs = [value("ids", whole, "b", 1), value("mask", whole, "b", "c"), value("longer", whole, "b", 1)]
    return small_session(helper.make_graph(nodes.made, "choose", inputs, outputs, nodes.constants), device)


class _Nodes:
    """Nodes with names of their own."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.constants: list[Any] = []

    def add(self, op: str, *inputs: str, out: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns its (first) output's name, the second one is that with ``_1``."""
        name = out or f"{op}_{len(self.made)}"
        names = [name, *(f"{name}_{n}" for n in range(1, outputs))]
        self.made.append(helper.make_node(op, list(inputs), names, **attributes))
        return name

    def whole(self, *numbers: int) -> str:
        """An int64 constant ``[len(numbers)]``."""
        name = f"whole_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name


def _draw(nodes: _Nodes, top_k: bool, top_p: bool) -> None:
    """Nodes that leave ``ids``; the draw is the first place where the cumulated probability exceeds the number."""
    add, double = nodes.add, TensorProto.DOUBLE
    row = nodes.whole(1)
    flat = add("Cast", add("Squeeze", "logits", row), to=double)
    scores = add("Div", flat, "temperature")
    most = add("ReduceMax", scores, row, keepdims=1)
    indices = ""
    if top_p:  # it is about the likeliest first; without it the vocabulary's order serves and nothing is sorted whole
        scores = add("TopK", scores, add("Shape", scores, start=1, end=2), axis=1, outputs=2)
        indices = f"{scores}_1"
    weights = add("Exp", add("Sub", scores, most))
    if top_k:
        best = add("TopK", scores, "top_k", axis=1, outputs=2)
        edge = add("ReduceMin", best, row, keepdims=1)
        weights = add("Mul", weights, add("Cast", add("Not", add("Less", scores, edge)), to=double))
    if top_p:
        shares = add("Div", weights, add("ReduceSum", weights, row, keepdims=1))
        before = add("CumSum", shares, nodes.whole(1), exclusive=1)
        weights = add("Mul", weights, add("Cast", add("Less", before, "top_p"), to=double))
    sums = add("CumSum", weights, nodes.whole(1))
    total = add("ReduceMax", sums, row, keepdims=1)
    wanted = add("Mul", "numbers", total)
    # A number of 1, which no generator gives, takes the last token that has a probability, not one beyond the row.
    passed = add("And", add("Not", add("Greater", sums, wanted)), add("Less", sums, total))
    steps = add("Cast", passed, to=TensorProto.INT64)
    place = add("ReduceSum", steps, row, keepdims=1, out="place" if top_p else "ids")
    if top_p:
        add("GatherElements", indices, place, axis=1, out="ids")
