"""A graph taken apart: its nodes in units, each of which can be cut out and run alone on values that it is given.

Weights stay where they are stored: a model that was cut out refers to the data file that lies beside it.
Try: ``python -m pytest tests/bench/matrix/test_subgraphs.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from bench.gate.localize import link_or_copy
from bench.matrix.rounding import PRODUCTS
from export.manifest import NORMS

Unit = tuple[int, ...]
"""Numbers of nodes, ascending."""
ALONE = ".alone"
"""What the name of a value ends in that one unit makes while another one, in the same model, is given it."""
LARGE_BYTES = 1 << 20
"""From here on the weights inside of an ONNX file are moved out of it: each cut would hold them once more."""
MOVED = "moved.data"
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
SHAPES = ("Shape", "Size")


class Subgraphs:
    """One ONNX file, to be used as a context manager: what is cut out of it lies in a temporary folder.

    Attributes:
        nodes: of the graph.
        units: every node that depends on the graph's inputs, one unit a node. What is constant (a Constant, a
            DequantizeLinear of weights) belongs to whoever reads it.
        segments: the same nodes, in stretches between two places at which all that goes on is one node's result: the
            residual stream, in a transformer.
    """

    def __init__(self, path: Path) -> None:
        self._model = onnx.load(path, load_external_data=False)
        self._work = tempfile.TemporaryDirectory()
        folder, graph = Path(self._work.name), self._model.graph
        stored = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
        for name in stored:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy((path.parent / name).resolve(), folder / name)
        if sum(len(t.raw_data) for t in graph.initializer) > LARGE_BYTES:
            onnx.save_model(
                self._model, folder / "moved.onnx", save_as_external_data=True, location=MOVED, size_threshold=1024
            )
        self.nodes: list[Any] = list(graph.node)
        self._weights = {t.name: t for t in graph.initializer}
        self._made = {name: k for k, node in enumerate(self.nodes) for name in node.output if name}
        self._inputs = [list(inputs_of(node)) for node in self.nodes]
        self._constant = self._constants({i.name for i in graph.input} - self._weights.keys())
        self.outputs = [o.name for o in graph.output]
        self._readers: dict[str, list[int]] = {}
        for k, names in enumerate(self._inputs):
            for name in names:
                self._readers.setdefault(name, []).append(k)
        self.units: list[Unit] = [(k,) for k in range(len(self.nodes)) if k not in self._constant]
        joints = self._joints()
        self.segments = self._split(joints)
        self._layers = self._layer_starts(joints)
        self._cuts = 0

    def __enter__(self) -> Subgraphs:
        return self

    def __exit__(self, *_: object) -> None:
        self._work.cleanup()

    @property
    def folder(self) -> Path:
        """Where the data files are that cuts refer to."""
        return Path(self._work.name)

    # -- what belongs together ---------------------------------------------------------------------------------------

    def _constants(self, inputs: set[str]) -> set[int]:
        """Nodes that depend on no input of the graph."""
        varies, found = set(inputs), set[int]()
        for k, node in enumerate(self.nodes):
            if node.op_type in RANDOM or any(name in varies for name in self._inputs[k]):
                varies.update(node.output)
            else:
                found.add(k)
        return found

    def _joints(self) -> list[int]:
        """Nodes after which nothing but their own results is still to be read, of what the token ids flow into."""
        last = {name: max(readers) for name, readers in self._readers.items()}
        flows, still_read, joints = {"input_ids"}, dict[str, int](), list[int]()
        for k, node in enumerate(self.nodes):
            if node.op_type in SHAPES or k in self._constant or not any(name in flows for name in self._inputs[k]):
                continue
            flows.update(filter(None, node.output))
            still_read |= {name: k for name in node.output if name in last}
            still_read = {name: maker for name, maker in still_read.items() if last[name] > k}
            if set(still_read.values()) == {k}:
                joints.append(k)
        return joints

    def _split(self, joints: Sequence[int]) -> list[Unit]:
        units, unit, ends = list[Unit](), list[int](), set(joints)
        for (k,) in self.units:
            unit.append(k)
            if k in ends:
                units.append(tuple(unit))
                unit = []
        return [*units, tuple(unit)] if unit else units

    def _layer_starts(self, joints: Sequence[int]) -> list[int]:
        """The first node of each layer, and the first one after the last layer; [] where no layers can be told."""
        attentions: dict[int, int] = {}
        for name in (n for n in self._readers if n.startswith("past_key_values.")):
            layer = int(name.split(".")[1])
            first = min((k for k in self._readers[name] if self.nodes[k].op_type not in SHAPES), default=-1)
            attentions[layer] = min(first, attentions.get(layer, first))
        before = [sum(j < attentions[k] for j in joints) - 1 for k in sorted(attentions)]  # joint in front of each
        if not before or before[0] < 0 or len(set(before)) < len(before):
            return []
        after = before[-1] + (before[-1] - before[-2] if len(before) > 1 else 2)
        places = [joints[k] for k in (*before, min(after, len(joints) - 1))]
        # A norm that adds the residual as well reads the next layer's weight.
        return [k if self.nodes[k].op_type in NORMS else k + 1 for k in places]

    def layer(self, node: int) -> int | None:
        """The decoder layer that a node is in; None for the embedding, the head and where layers cannot be told."""
        found = sum(start <= node for start in self._layers) - 1
        return found if 0 <= found < len(self._layers) - 1 else None

    # -- what goes in and comes out ----------------------------------------------------------------------------------

    def given(self, unit: Iterable[int]) -> list[str]:
        """Values that a unit reads and does not make; weights and constants left out."""
        inside = set(unit)
        found = dict.fromkeys(name for k in sorted(inside) for name in self._inputs[k] if name not in self._weights)
        return [n for n in found if (maker := self._made.get(n)) is None or maker not in inside | self._constant]

    def made(self, unit: Iterable[int]) -> list[str]:
        """Values of a unit that somebody reads outside of it, or that are the graph's outputs."""
        inside = set(unit)
        names = [name for k in sorted(inside) for name in self.nodes[k].output if name]
        return [n for n in names if n in self.outputs or set(self._readers.get(n, ())) - inside]

    def read_after(self, name: str, node: int) -> bool:
        """Whether a node after this one reads the value."""
        return any(k > node for k in self._readers.get(name, ()))

    def product(self, node: int) -> tuple[int | None, int]:
        """``accuracy_level`` and number of terms of a product; the level is None where the session decides it."""
        n = self.nodes[node]
        attributes = {a.name: a.i for a in n.attribute}
        if n.op_type == "MatMulNBits":
            return attributes.get("accuracy_level", 0), attributes["K"]
        stored = [name for name in n.input if name in self._weights or self._made.get(name) in self._constant]
        makers = {self.nodes[self._made[name]].op_type for name in stored if name in self._made}
        dims = [d for name in stored if name in self._weights for d in self._weights[name].dims[:1]]
        return None if "DequantizeLinear" in makers else 0, max(dims, default=1) if n.op_type in PRODUCTS else 1

    # -- cutting -----------------------------------------------------------------------------------------------------

    def cut(self, units: Sequence[Unit], types: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Any:
        """The units as one ``onnx.ModelProto``, none of which reads what another one makes.

        Args:
            units: to be cut out.
            types: values of the types that go in.
            outputs: of the units; where several units are cut, each comes out as its name and :data:`ALONE`.
        """
        own = ALONE if len(units) > 1 else ""
        kept, given = list[tuple[int, Any]](), dict[str, None]()
        for unit in units:
            given |= dict.fromkeys(self.given(unit))
            makes = {name: name + own for k in unit for name in self.nodes[k].output if name}
            kept += [(k, renamed(self.nodes[k], makes) if own else self.nodes[k]) for k in unit]
        constants = set[int]()
        names = {name for k, _ in kept for name in self._inputs[k]}
        while more := {self._made[n] for n in names if self._made.get(n) in self._constant} - constants:
            constants |= more
            names |= {name for k in more for name in self._inputs[k]}
        kept = sorted([*kept, *((k, self.nodes[k]) for k in constants)], key=lambda pair: pair[0])
        graph = helper.make_graph(
            [node for _, node in kept],
            "cut",
            [_info(name, types[name]) for name in given],
            [onnx.ValueInfoProto(name=name + own) for name in outputs],
            [self._weights[name] for name in sorted(names & self._weights.keys())],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, functions=self._model.functions)
        model.ir_version = self._model.ir_version
        return model

    @property
    def empty(self) -> Any:
        """A model of the same version that only passes one value on."""
        value = helper.make_tensor_value_info("x", 1, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", [value], [])
        graph.output.add(name="y")
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        return model

    def kept(self, model: Any) -> Any:
        """The model, which then needs no file that goes with this object."""
        for tensor in model.graph.initializer:
            if any(e.value == MOVED for e in tensor.external_data):
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        return model

    def write(self, model: Any) -> Path:
        """The model as a file beside the data that it refers to; the one before is overwritten."""
        path = self.folder / f"cut{self._cuts % 2}.onnx"  # two, for a runtime that still has the last one mapped
        self._cuts += 1
        onnx.save_model(model, path)
        return path


def _info(name: str, value: NDArray[Any]) -> Any:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name, kind, [f"{name}.{k}" for k in range(value.ndim)])


def inputs_of(node: Any) -> Iterator[str]:
    """Names that a node reads, its subgraphs' reads of outer values among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            inner = {i.name for i in graph.input} | {t.name for t in graph.initializer}
            inner |= {name for n in graph.node for name in n.output}
            yield from (name for n in graph.node for name in inputs_of(n) if name not in inner)
            yield from (o.name for o in graph.output if o.name not in inner)


def renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A copy of a node over values of other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(n, n) for n in node.input]
    copy.output[:] = [names.get(n, n) for n in node.output]
    return copy
