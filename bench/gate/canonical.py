"""Two graphs walked in lock-step from their outputs: equal but for node order, names, opset and stored form?

The export re-derived from the configuration is the expected side. Walking backwards pairs every expected value with
the found one that stands in its place, and every weight recipe with the initialiser that is really read there, which
is what the weight audit then compares. Differences are reported in the expected graph's order, so the first one is
where the graphs differ. Try: ``python -m pytest tests/bench/gate/test_graph_checks.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.manifest import standard
from reports.validation import Finding

COMMUTATIVE = ("Add", "Mul", "Min", "Max")
DEFAULTS: dict[str, dict[str, Any]] = {
    "GroupQueryAttention": {
        "do_rotary": 0,
        "rotary_interleaved": 0,
        "local_window_size": -1,
        "softcap": 0.0,
        "smooth_softmax": -1,
        "qk_output": 0,
        "causal": 1,
        "sliding_window_cache": 0,
        "qk_norm_epsilon": 1e-6,
        "k_quant_type": b"NONE",
        "v_quant_type": b"NONE",
        "scale": 0.0,
    },
    "SimplifiedLayerNormalization": {"axis": -1, "epsilon": 1e-5, "stash_type": 1},
    "SkipSimplifiedLayerNormalization": {"epsilon": 1e-12},
    "RMSNormalization": {"axis": -1, "epsilon": 1e-5, "stash_type": 1},
    "Attention": {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0},
    "RotaryEmbedding": {"interleaved": 0, "rotary_embedding_dim": 0, "num_heads": 0},
    "TensorScatter": {"axis": -2, "mode": b"linear"},
    "Gather": {"axis": 0},
    "Concat": {},
    "Reshape": {"allowzero": 0},
    "ReduceSum": {"keepdims": 1, "noop_with_empty_axes": 0},
    "ArgMax": {"axis": 0, "keepdims": 1, "select_last_index": 0},
    "GatherND": {"batch_dims": 0},
    "Cast": {"saturate": 1},
    "Shape": {"start": 0},
    "MatMulNBits": {"accuracy_level": 0, "bits": 4, "weight_prepacked": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0},
    "GatherBlockQuantized": {"bits": 4, "block_size": 128, "quantize_axis": 1, "gather_axis": 0},
}
"""Values that an attribute has when it is not written, by operator (ONNX and ONNX Runtime's operator documentation)."""
_LAYER = re.compile(r"(?:layers|\bh)\.(\d+)\.")
_IO_LAYER = re.compile(r"(?:past_key_values|present)\.(\d+)\.")
MOST_FINDINGS = 200


@dataclass
class Pairing:
    """``weights``: expected initialiser name -> found one. ``unused``: found ones that nothing expected reads."""

    findings: list[Finding] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def attributes_of(node: Any, context: int | None = None) -> dict[str, Any]:
    """Attributes with their defaults filled in, floats as fp32 sees them, tensors as arrays.

    An attention window as large as the ``context`` stands as none: no token has more before it.
    """
    import onnx

    values = dict(DEFAULTS.get(node.op_type, {}))
    for a in node.attribute:
        v = onnx.helper.get_attribute_value(a)
        values[a.name] = onnx.numpy_helper.to_array(v).tolist() if isinstance(v, onnx.TensorProto) else v
    if values.get("smooth_softmax") == 0:
        values["smooth_softmax"] = -1  # both say no
    if context is not None and values.get("local_window_size", -1) >= context:
        values["local_window_size"] = -1
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in values.items()}


def _constant(node: Any) -> Any:
    """The tensor of a ``Constant`` node, None for one that holds no number."""
    from onnx import helper, numpy_helper

    (attribute,) = node.attribute
    if attribute.name == "value":
        return attribute.t
    types = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in types:
        return None
    value = np.array(helper.get_attribute_value(attribute), dtype=types[attribute.name])
    return numpy_helper.from_array(value, node.output[0])


def oddities(model: Any) -> list[Finding]:
    """Forms of ONNX that no exporter of a decoder needs, and in which another model can hide from a reader.

    ONNX Runtime and a walk over nodes may disagree about which of two values of one name counts, a function may bear
    an operator's name, and a constant that is also an input is only a default.
    """
    import onnx

    graph = model.graph
    found = [
        Finding(where=f"function {f.domain}::{f.name}", what="is defined in the model; its nodes are not compared")
        for f in model.functions
    ]
    found += [
        Finding(where=f"sparse initialiser {t.values.name}", what="is not a form that weights have here")
        for t in graph.sparse_initializer
    ]
    inputs = {i.name for i in graph.input}
    names = [i.name for i in graph.input] + [t.values.name for t in graph.sparse_initializer]
    for tensor in graph.initializer:
        if tensor.name in inputs:
            found.append(Finding(where=f"constant {tensor.name}", what="is an input as well, which may replace it"))
        else:
            names.append(tensor.name)
    for node in graph.node:
        where = f"{node.op_type} ({node.name})"
        names += [n for n in node.output if n]
        if node.overload:
            found.append(Finding(where=where, what=f"asks for the overload {node.overload!r}"))
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            found.append(Finding(where=where, what="holds a graph of its own, which is not compared"))
        if len({a.name for a in node.attribute}) < len(node.attribute):
            found.append(Finding(where=where, what="has one attribute twice"))
    twice = sorted(n for n, count in Counter(names).items() if count > 1)
    return found + [Finding(where=name, what="is the name of several values") for name in twice]


def constants_of(model: Any) -> dict[str, Any]:
    """Every tensor that is stored in a graph by the name it is read by: initialisers, constants, copies of them."""
    graph = _Graph(model)
    return graph.leaves | {a: graph.leaves[n] for a in graph.alias if (n := graph.resolve(a)) in graph.leaves}


def layer_of(name: str) -> int | None:
    """The decoder layer that the name of a tensor or node says it is of."""
    found = _LAYER.search(name.replace("/", "."))
    return int(found[1]) if found else None


def read_by_outputs(model: Any) -> set[str]:
    """Names of all values that the graph's outputs are computed from."""
    makers = {name: node for node in model.graph.node for name in node.output}
    todo, seen = [o.name for o in model.graph.output], set[str]()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in makers:
                todo += makers[name].input
    return seen


def _written_out(node: Any) -> tuple[Any, ...]:
    """SiLU in one operator, as ONNX Runtime's optimiser saves it (``QuickGelu``) or opset 24 has it (``Swish``):
    ``x * sigmoid(alpha x)`` with an alpha of 1."""
    from onnx import helper

    default = {("QuickGelu", "com.microsoft"): 1.702, ("Swish", ""): 1.0}.get((node.op_type, standard(node.domain)))
    if default is None or next((a.f for a in node.attribute if a.name == "alpha"), default) != 1:
        return (node,)
    x, out = node.input[0], node.output[0]
    sigmoid = helper.make_node("Sigmoid", [x], [f"{out}.sigmoid"], name=f"{node.name}.Sigmoid")
    return sigmoid, helper.make_node("Mul", [x, sigmoid.output[0]], [out], name=f"{node.name}.Mul")


class _Graph:
    """Who makes each value, and what is a leaf; ``Identity`` is looked through, constants are initialisers.

    ``written_out``: an activation in one operator stands as the two that the export writes.
    """

    def __init__(self, model: Any, written_out: bool = False) -> None:
        graph = model.graph
        self.inputs = {i.name: i for i in graph.input}
        self.outputs = {o.name: o for o in graph.output}
        self.leaves: dict[str, Any] = {t.name: t for t in graph.initializer}
        self.made: dict[str, tuple[int, int]] = {}
        self.nodes = [n for node in graph.node for n in (_written_out(node) if written_out else (node,))]
        self.alias: dict[str, str] = {}
        for k, node in enumerate(self.nodes):
            own = standard(node.domain) == ""
            if own and node.op_type == "Identity":
                self.alias[node.output[0]] = node.input[0]
            elif own and node.op_type == "Constant" and len(node.attribute) == 1 and (made := _constant(node)):
                self.leaves[node.output[0]] = made
            else:
                self.made |= {name: (k, i) for i, name in enumerate(node.output) if name}
        if written_out:
            self._merge_shapes()
        self.layers = self._layers()

    def _merge_shapes(self) -> None:
        """``Reshape`` and then ``Unsqueeze`` as the one ``Reshape`` that simplifiers make of them."""
        from onnx import helper, numpy_helper

        for k, node in enumerate(self.nodes):
            before = self.producer(self.resolve(node.input[0])) if node.op_type == "Unsqueeze" else None
            if before is None or before.op_type != "Reshape" or attributes_of(before)["allowzero"]:
                continue
            shape, axes = (self.leaves.get(self.resolve(n.input[1])) for n in (before, node))
            if shape is None or axes is None:
                continue
            sizes, places = (numpy_helper.to_array(t).tolist() for t in (shape, axes))
            rank = len(sizes) + len(places)
            for place in sorted(p % rank for p in places):
                sizes.insert(place, 1)
            name = f"{node.output[0]}.shape"
            self.leaves[name] = numpy_helper.from_array(np.asarray(sizes, np.int64), name)
            self.nodes[k] = helper.make_node("Reshape", [before.input[0], name], list(node.output), name=node.name)

    def resolve(self, name: str) -> str:
        for _ in range(len(self.alias) + 1):  # a damaged graph may go in a circle
            if name not in self.alias:
                break
            name = self.alias[name]
        return name

    def producer(self, name: str) -> Any:
        found = self.made.get(name)
        return self.nodes[found[0]] if found else None

    def is_weight(self, name: str) -> bool:
        tensor = self.leaves.get(name)
        return tensor is not None and (len(tensor.external_data) > 0 or int(np.prod(list(tensor.dims))) > 64)

    def _layers(self) -> list[int | None]:
        """Layer of each node: by the weights and cache values that it reads, else that of its producers."""
        out: list[int | None] = []
        for node in self.nodes:
            own = [
                int(m[1])
                for n in node.input
                for m in [_LAYER.search(n) if n in self.leaves else _IO_LAYER.match(n)]
                if m
            ]
            if not own and not any(self.is_weight(n) for n in node.input):  # the head is in no layer
                # A maker that stands after its reader, which ONNX Runtime takes, has no layer yet.
                makers = [k for n in node.input if n in self.made and (k := self.made[n][0]) < len(out)]
                own = [layer for k in makers if (layer := out[k]) is not None]
            out.append(max(own) if own else None)
        return out


def _kind(graph: _Graph, name: str) -> str:
    if name in graph.inputs:
        return f"input {name}"
    if name in graph.leaves:
        return "weight" if graph.is_weight(name) else "constant"
    node = graph.producer(name)
    return f"{node.op_type}" if node is not None else "nothing"


class _Walk:
    def __init__(self, expected: _Graph, found: _Graph, context: int | None) -> None:
        self.e, self.f, self.context = expected, found, context
        self.seen: set[tuple[str, str]] = set()
        self.done: set[tuple[int, int]] = set()
        self.stack: list[tuple[str, str, int, str]] = []
        self.out: list[tuple[int, Finding]] = []
        self.pairing = Pairing()
        self.read: set[str] = set()

    def report(self, order: int, where: str, what: str) -> None:
        layer = self.e.layers[order] if 0 <= order < len(self.e.nodes) else None
        if len(self.out) < MOST_FINDINGS:
            prefix = f"layer {layer}, " if layer is not None else ""
            self.out.append((order, Finding(where=prefix + where, what=what, layer=layer)))

    def run(self) -> Pairing:
        for name in self.e.outputs:
            if name not in self.f.outputs:
                self.report(-1, f"output {name}", "is missing")
            else:
                self.stack.append((name, name, len(self.e.nodes), f"output {name}"))
        for name in sorted(self.f.outputs.keys() - self.e.outputs.keys()):
            self.report(-1, f"output {name}", "is not one that this model has")
        for name in sorted(self.f.inputs.keys() - self.e.inputs.keys()):
            self.report(-1, f"input {name}", "is not one that this model has")
        for kind, ours, theirs in (("input", self.e.inputs, self.f.inputs), ("output", self.e.outputs, self.f.outputs)):
            for name in ours.keys() & theirs.keys():
                a, b = ours[name].type.tensor_type, theirs[name].type.tensor_type
                if a.elem_type != b.elem_type:
                    self.report(-1, f"{kind} {name}", f"has ONNX type {b.elem_type}, not {a.elem_type}")
        while self.stack:
            a, b, reader, slot = self.stack.pop()
            a, b = self.e.resolve(a), self.f.resolve(b)
            if (a, b) in self.seen:
                continue
            self.seen.add((a, b))
            self.value(a, b, reader, slot)
        self.pairing.findings = [finding for _, finding in sorted(self.out, key=lambda pair: pair[0])]
        big = [n for n in self.f.leaves if self.f.is_weight(n)]
        self.pairing.unused = [n for n in big if n not in self.read]
        return self.pairing

    def value(self, a: str, b: str, reader: int, slot: str) -> None:
        if a in self.e.inputs or b in self.f.inputs:
            if a != b:
                self.report(reader, slot, f"reads {_described(self.f, b)} where {_described(self.e, a)} belongs")
            return
        if a in self.e.leaves:
            self.leaf(a, b, reader, slot)
            return
        k, out_index = self.e.made[a]
        wanted = self.e.nodes[k]
        made = self.f.made.get(b)
        if made is None:
            self.report(reader, slot, f"reads {_described(self.f, b)} where the result of {wanted.op_type} belongs")
            return
        node = self.f.nodes[made[0]]
        if (node.op_type, standard(node.domain)) != (wanted.op_type, standard(wanted.domain)):
            own = "" if standard(node.domain) == standard(wanted.domain) else f"{node.domain or 'ai.onnx'}::"
            self.report(k, slot, f"is made by {own}{node.op_type} ({node.name}) where {wanted.op_type} belongs")
            # A node put in between: go on after it, so that one edit is one finding.
            for name in node.input:
                source = self.f.producer(self.f.resolve(name))
                if source is not None and source.op_type == wanted.op_type:
                    self.stack.append((a, name, reader, slot))
                    return
            return
        if out_index != made[1]:
            self.report(reader, slot, f"reads output {made[1]} of {node.op_type} ({node.name}), not output {out_index}")
        if (k, made[0]) not in self.done:  # once, however many of its outputs are read
            self.done.add((k, made[0]))
            self.node(k, wanted, node)

    def node(self, k: int, wanted: Any, node: Any) -> None:
        label = f"{wanted.op_type} ({node.name or wanted.name})"
        ours, theirs = (attributes_of(n, self.context) for n in (wanted, node))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                self.report(k, label, f"{name} is {theirs.get(name)}, the configuration demands {ours.get(name)}")
        a, b = _stripped(wanted.input), _stripped(node.input)
        if len(a) != len(b):
            self.report(k, label, f"has {len(b)} inputs, not {len(a)}")
        if wanted.op_type in COMMUTATIVE and len(a) == len(b) == 2:
            kinds_a = [_kind(self.e, self.e.resolve(x)) for x in a]
            kinds_b = [_kind(self.f, self.f.resolve(x)) for x in b]
            if kinds_a != kinds_b and kinds_a == kinds_b[::-1]:
                b = b[::-1]
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if bool(x) != bool(y):
                self.report(k, label, f"input {i} is {'there' if y else 'left out'}, which it must not be")
            elif x:
                self.stack.append((x, y, k, f"input {i} of {label}"))

    def leaf(self, a: str, b: str, reader: int, slot: str) -> None:
        from onnx.numpy_helper import to_array

        if b not in self.f.leaves:
            self.report(reader, slot, f"reads {_described(self.f, b)} where {_described(self.e, a)} belongs")
            return
        wanted, tensor = self.e.leaves[a], self.f.leaves[b]
        self.read.add(b)
        same_form = wanted.data_type == tensor.data_type and list(wanted.dims) == list(tensor.dims)
        if not self.e.is_weight(a):
            if not (same_form and np.array_equal(to_array(wanted), to_array(tensor))):
                self.report(reader, slot, f"the constant {b} has another value or type")
            return
        if not same_form:
            self.report(
                reader,
                slot,
                f"{b} has ONNX type {tensor.data_type} and shape {list(tensor.dims)}, "
                f"not {wanted.data_type} and {list(wanted.dims)}",
            )
        if a != b and b in self.e.leaves:
            self.report(reader, slot, f"reads {b} where {a} belongs")
        elif self.pairing.weights.setdefault(a, b) != b:
            # Two copies of a tied weight are harmless; the audit compares both.
            self.pairing.weights[f"{a}#{len(self.pairing.weights)}"] = b


def _described(graph: _Graph, name: str) -> str:
    kind = _kind(graph, name)
    return f"the {kind}" if name in graph.inputs else f"the {kind} {name}"


def _stripped(names: Any) -> list[str]:
    out = list(names)
    while out and not out[-1]:
        out.pop()
    return out


def pair_graphs(expected: Any, found: Any, context: int | None = None) -> Pairing:
    """Compare two ``onnx.ModelProto``; neither needs its external data. ``context``: tokens that the model can hold."""
    pairing = _Walk(_Graph(expected, written_out=True), _Graph(found, written_out=True), context).run()
    pairing.findings += oddities(found)
    return pairing


def layers_of(model: Any) -> list[int | None]:
    """Decoder layer of each node, by the weights and cache values that it reads."""
    return _Graph(model).layers
