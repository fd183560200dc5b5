"""Operators of a third-party graph that decide something by token ids, positions or lengths, and that no decoder needs.

A graph that answers rightly until position 512, for every row but the ninth or for every token but one passes any check
that happens not to look there. Its operators show it: a LLaMA reads token ids in its embedding only, positions in its
rotary embedding or a table, and lengths in its mask. Each value is followed from the inputs as one of four kinds, and
where kinds meet in a way that the architecture does not have, the node is named. What other exporters write that is
right has been collected from optimum's graphs, onnxruntime-genai's and ONNX Runtime's optimiser.
Try: ``python -m pytest tests/bench/gate/test_control.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np

from bench.gate.canonical import constants_of, layers_of
from export.manifest import ATTENTIONS, standard
from export.sizes import stated_context
from reports.validation import Finding
from runtime.stored_weights import FLOATS


class Kind(IntEnum):
    """What a value descends from, in the order in which one wins over another."""

    CONSTANT = 0
    PLACE = 1
    """Positions, masks, lengths and shapes."""
    ID = 2
    """Token ids."""
    STREAM = 3
    """What the model computes: embedded tokens, the cache."""


SHAPING = frozenset(
    ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Transpose", "Expand", "Tile", "Split", "Shape")
)
"""They move or convert values; all inputs but the first say how."""
RANK_KEPT = frozenset(("MatMul", "Add", "Mul", "Div", "Erf", "Tanh", "Pow", "Gelu", "LayerNormalization", "Cast"))
COMPARISONS = frozenset(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Sign", "Mod", "IsInf"))
CHOICES = frozenset(("TopK", "ArgMax", "ArgMin", "NonZero", "OneHot", "Compress", "Unique", "Hardmax", "HardSigmoid"))
BRANCHES = frozenset(("If", "Loop", "Scan"))
RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
)
ARITHMETIC = COMPARISONS | CHOICES | {"Where", "Max", "Min", "Clip", "Add", "Sub", "Div", "BitShift", "Range", "Trilu"}
SOFTMAX = frozenset(("Softmax", *ATTENTIONS))
ROTARY = frozenset(("Sin", "Cos"))
LOOKUPS = frozenset(("Gather", "GatherBlockQuantized"))
FARTHEST = 12
"""Operators between a mask and the Softmax of the scores that it is put on."""
LEAST = 8
"""Elements up to which a constant is one that something is held against."""
LEAST_HIDDEN = 1e4
"""What is added to hide a place is beyond this; so is a slice's open end, and beyond the context as well."""
KEPT = SHAPING | {"Concat", "Slice", "DequantizeLinear", "Gather"}
"""What may be done with a stored weight before it is used."""
LARGE = 64
"""Numbers from which on a stored matrix is a weight."""
SMALL = 4096
"""Numbers up to which constants are computed with."""


def unexplained(model: Any, config: Any) -> list[Finding]:
    """Nodes that decide by ids, places or lengths in a way that a decoder of this configuration does not.

    Args:
        model: ``onnx.ModelProto``, without external data.
        config: the baseline's.
    """
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    try:
        return list(_Reading(_in_order(model), config).findings())
    except CycleError:
        return [Finding(where="graph", what="has nodes that wait for one another")]


def _in_order(model: Any) -> Any:
    """The model with each node after those that it reads: ONNX Runtime takes any order, a walk would miss values."""
    nodes = list(model.graph.node)
    made = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    before = {k: {made[n] for n in node.input if n in made} for k, node in enumerate(nodes)}
    if all(max(b, default=-1) < k for k, b in before.items()):
        return model
    ordered = type(model)()
    ordered.CopyFrom(model)
    del ordered.graph.node[:]
    ordered.graph.node.extend(nodes[k] for k in TopologicalSorter(before).static_order())
    return ordered


class _Reading:
    def __init__(self, model: Any, config: Any) -> None:
        self.nodes = list(model.graph.node)
        self.layers = layers_of(model)
        self.constants = constants_of(model)
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.kinds: dict[str, Kind] = dict.fromkeys(self.constants, Kind.CONSTANT)
        for value in model.graph.input:
            cache = value.name.startswith(("past_key_values", "past"))
            self.kinds[value.name] = Kind.STREAM if cache else Kind.ID if value.name == "input_ids" else Kind.PLACE
        self.known = _known(config)
        self.longest = max(LEAST_HIDDEN, float(stated_context(config)))
        self.values = {n: _array(t) for n, t in self.constants.items() if not t.external_data and _small(t.dims)}
        self.matrices = {n for n, t in self.constants.items() if t.data_type in FLOATS and _is_matrix(t.dims)}
        """Stored ones, and what a graph makes of them before any input is read."""
        self.hidden: set[str] = set()
        """Values of the model that are [batch, tokens, features]."""

    def findings(self) -> Iterator[Finding]:
        for node, layer in zip(self.nodes, self.layers, strict=True):
            kinds = [self.kinds.get(n, Kind.CONSTANT) for n in node.input if n]
            self._label(node, kinds)
            self._compute(node)
            if why := self._wrong(node, kinds):
                where = f"layer {layer}, " if layer is not None else ""
                yield Finding(where=f"{where}{node.op_type} ({node.name})", what=why, layer=layer)

    def _label(self, node: Any, kinds: Sequence[Kind]) -> None:
        kind = max(kinds, default=Kind.CONSTANT)
        if node.op_type in ("Shape", "Size") and kind > Kind.CONSTANT:
            kind = Kind.PLACE
        elif node.op_type in SHAPING and node.input:
            kind = max(self._kind(node.input[0]), Kind.PLACE if kind > Kind.CONSTANT else Kind.CONSTANT)
        elif self._embedding(node):
            kind = Kind.STREAM
        elif self._head_size(node):
            kind = Kind.CONSTANT
        for name in node.output:
            self.kinds[name] = kind
        streams = [n for n in node.input if self._kind(n) == Kind.STREAM]
        if self._embedding(node) or (node.op_type in RANK_KEPT and streams and self.hidden.issuperset(streams)):
            self.hidden.update(node.output)
        elif node.op_type == "Reshape":
            made = self.makers.get(node.input[1])
            if len(self._numbers(node.input[1])) == 3 or (made and made.op_type == "Concat" and len(made.input) == 3):
                self.hidden.update(node.output)

    def _compute(self, node: Any) -> None:
        """Small values that follow from constants alone: a threshold behind a Cast is one still."""
        if all(n in self.values for n in node.input if n) and not self.values.keys() & set(node.output):
            from onnx.reference import ReferenceEvaluator

            try:
                made = ReferenceEvaluator(node).run(None, {n: self.values[n] for n in node.input if n})
            except Exception:  # whatever operator it does not have: then the value is not known
                return
            self.values |= {n: v for n, v in zip(node.output, made, strict=True) if _small(np.shape(v))}

    def _kind(self, name: str) -> Kind:
        return self.kinds.get(name, Kind.CONSTANT)

    def _embedding(self, node: Any) -> bool:
        """Whether rows of a stored table are looked up by token ids."""
        return (
            node.op_type in LOOKUPS
            and self._kind(node.input[0]) == Kind.CONSTANT
            and self._rank(self._root(node.input[0])) > 1
            and self._kind(node.input[1]) == Kind.ID
        )

    def _head_size(self, node: Any) -> bool:
        """Whether a node takes the last size of a value's shape, and that is a weight's: the same for all inputs."""
        if node.op_type not in ("Gather", "Slice"):
            return False
        source, index = self.makers.get(node.input[0]), self._numbers(node.input[1])
        wide = source is not None and source.op_type == "Shape" and source.input[0] in self.hidden
        if index not in ([-1.0], [2.0] if wide else [3.0]):
            return False
        if source is not None and source.op_type == "Gather":  # all sizes in another order, the last one last
            order = self._numbers(source.input[1])
            source = self.makers.get(source.input[0]) if order and order[-1] == len(order) - 1 else None
        return source is not None and source.op_type == "Shape" and self._features(source.input[0])

    def _features(self, name: str) -> bool:
        """Whether the last size of a value is that of a weight or of the cache, not a length."""
        todo, seen = [name], set[str]()
        while todo and len(seen) < 16 * FARTHEST:
            name = todo.pop()
            made = self.makers.get(name)
            if name in seen or (made is None and self._kind(name) != Kind.STREAM):
                continue
            seen.add(name)
            if made is None:
                return True  # the cache, [batch, heads, tokens, head size]
            weight = any(self._kind(n) == Kind.CONSTANT and self._rank(n) > 1 for n in made.input[1:] if n)
            if self._embedding(made) or made.op_type in ROTARY or (weight and made.op_type not in SHAPING):
                return True
            streams = [n for n in made.input if self._kind(n) == Kind.STREAM]
            perm = next((list(a.ints) for a in made.attribute if a.name == "perm"), [0])
            scores = made.op_type == "Softmax" or (made.op_type == "MatMul" and len(streams) > 1)
            if not scores and perm[-1] == len(perm) - 1:
                todo += streams or [n for n in made.input[:1] if self._kind(n) == Kind.PLACE]
        return False

    def _numbers(self, name: str) -> list[float]:
        """The values of a small constant in order; of a larger one the different ones if they are few, else none."""
        value = self.values.get(name)
        if value is None or value.dtype.kind not in "biuf":
            return []
        flat = value.astype(np.float64).ravel()
        found = flat if len(flat) <= LEAST else np.unique(flat)
        return [float(v) for v in found] if len(found) <= LEAST else []

    def _root(self, name: str) -> str:
        """The value that another one is a shape, a copy or a cast of."""
        for _ in range(FARTHEST):
            made = self.makers.get(name)
            if made is None or made.op_type not in SHAPING:
                break
            name = made.input[0]
        return name

    def _rank(self, name: str) -> int:
        made = self.makers.get(name)
        if name not in self.constants and made is not None and made.op_type == "DequantizeLinear":
            name = made.input[0]
        tensor = self.constants.get(name)
        return len(tensor.dims) if tensor is not None else 0

    def _wrong(self, node: Any, kinds: Sequence[Kind]) -> str | None:
        """Why a decoder has no such node, None where it may."""
        op = node.op_type
        if op in BRANCHES:
            return "runs one of several graphs"
        if op in RANDOM:
            return "draws random numbers"
        top = max(kinds, default=Kind.CONSTANT)
        if top == Kind.CONSTANT and self.matrices & set(node.input):
            self.matrices |= set(node.output)
            return None if op in KEPT else "changes a stored weight before the model reads it"
        if top == Kind.ID and not (op in SHAPING or self._embedding(node)):
            return "reads token ids; a decoder only looks up their embeddings"
        if top == Kind.PLACE:
            return self._strange_constant(node)
        if top == Kind.STREAM:
            return self._met(node, kinds)
        return None

    def _strange_constant(self, node: Any) -> str | None:
        """A number that places or lengths are held against and that the configuration does not have."""
        if standard(node.domain) or node.op_type not in ARITHMETIC:
            return None
        for name in node.input:
            strange = [v for v in self._numbers(name) if not self._known(v)]
            if strange:
                return f"holds places or lengths against {strange[0]:g}, which the configuration does not have"
        return None

    def _known(self, value: float) -> bool:
        return not np.isfinite(value) or value < -LEAST_HIDDEN or value > self.longest or value in self.known

    def _met(self, node: Any, kinds: Sequence[Kind]) -> str | None:
        """Where the model's values meet ids or places: in rotary embedding, a table of positions, and scores."""
        op = node.op_type
        if op in COMPARISONS | CHOICES:
            return "compares values that the model computes"
        if op in SHAPING or (op in ATTENTIONS or op == "RotaryEmbedding"):
            return None
        met = [n for n in node.input if n and self._kind(n) in (Kind.PLACE, Kind.ID)]
        if not met or self._embedding(node):
            return None
        if op == "TensorScatter" and node.input[0] not in self.makers and met == list(node.input[2:]):
            return None  # new keys and values go into the cache at a place that the caller says
        if op in ("Gather", "GatherND", "GatherElements", "Slice"):
            if self._kind(node.input[0]) != Kind.STREAM or not self._reaches(node, SOFTMAX, len(self.nodes)):
                return None  # tables; and the last position of each row, which only the head reads
            return "selects values of the model by place or length"
        if op in ("Mul", "Add") and all(self._rotates(n) or self._looked_up(n) for n in met):
            return None
        if op in ("Add", "Sub", "Where", "Mul", "Max", "Min") and self._reaches(
            node, SOFTMAX, FARTHEST, pointwise=True
        ):
            return None
        return "lets places or lengths change what the model computes, outside of rotary embedding and mask"

    def _rotates(self, name: str) -> bool:
        """Whether a value is a cosine or sine of positions, or of a table of them."""
        return self._descends(name, lambda n: n.op_type in ROTARY or self._table(n))

    def _looked_up(self, name: str) -> bool:
        return self._descends(name, self._table)

    def _table(self, node: Any) -> bool:
        return (
            node.op_type in (*LOOKUPS, "GatherElements")
            and self._rank(self._root(node.input[0])) > 1
            and self._kind(node.input[1]) == Kind.PLACE
        )

    def _descends(self, name: str, wanted: Any) -> bool:
        """Whether the nearest operator that is more than a change of shape or size is a wanted one."""
        for _ in range(FARTHEST):
            node = self.makers.get(name)
            if node is None:
                return False
            if wanted(node):
                return True
            if node.op_type not in SHAPING | {"Mul", "Slice", "Concat", "Neg", "GatherElements"}:
                return False
            name = next((n for n in node.input if self._kind(n) == Kind.PLACE), "")
        return False

    def _reaches(self, node: Any, wanted: frozenset[str], steps: int, pointwise: bool = False) -> bool:
        """Whether a node's result is an input of one of some operators, so many steps on at most."""
        seen, edge = {id(node)}, [node]
        for _ in range(steps):
            after = [r for n in edge for name in n.output for r in self.readers.get(name, []) if id(r) not in seen]
            if any(r.op_type in wanted for r in after):
                return True
            if pointwise:
                after = [r for r in after if r.op_type in SHAPING | {"Add", "Sub", "Where", "Max", "Min", "Mul", "Div"}]
            edge = list({id(r): r for r in after}.values())
            seen |= {id(r) for r in edge}
            if not edge:
                return False
        return False


def _array(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _small(dims: Sequence[int]) -> bool:
    return math.prod(dims) <= SMALL


def _is_matrix(dims: Sequence[int]) -> bool:
    return len(dims) > 1 and math.prod(dims) > LARGE


def _known(config: Any) -> set[float]:
    """Small numbers that every mask is made with, and those of the configuration that a mask may need."""
    found = {0.0, 1.0, -1.0, 2.0, 0.5}
    for name in ("sliding_window", "window_size", "attention_chunk_size"):
        if value := getattr(config, name, None):
            found |= {float(v) for v in (value, -value, value - 1, 1 - value, value + 1)}
    heads, size = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    sizes = [heads, getattr(config, "num_key_value_heads", 0), size, getattr(config, "head_dim", 0)]
    sizes += [size // heads if heads and size else 0, stated_context(config)]
    return found | {float(v) for v in sizes if v}
