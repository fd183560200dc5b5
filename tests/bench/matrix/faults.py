"""Kernels that compute wrongly: changes to a graph, as it is opened, that stand for a broken ONNX Runtime.

A fault acts on whatever node its kernel would run, in a whole folder or in a model of one node that was cut out.
:func:`faulty_environment` makes a virtual environment whose ``onnxruntime.InferenceSession`` has the fault. It loads
this file by its path, so nothing of ours is imported here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

HERE = 1
"""The layer that is wrong, where it is one."""
FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 11, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
}
"""Configurations of other architectures than LLaMA: windows, biases, norms of single heads."""


class Wrong:
    """A wrong copy of one node, with what is put in front of it and after it."""

    def __init__(self, model: Any, node: Any) -> None:
        self.model, self.node, self.prefix = model, node, f"{node.name or node.output[0]}.wrong"
        self.copy = onnx.NodeProto()
        self.copy.CopyFrom(node)
        self.copy.name = self.prefix
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.constants: list[Any] = []
        self.replaced: dict[int, str] = {}

    def constant(self, value: Any) -> str:
        name = f"{self.prefix}.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, place: str, op: str, *inputs: str, **attributes: Any) -> str:
        """A node in front (``before``) or behind (``after``); the name of its result."""
        nodes: list[Any] = getattr(self, place)
        name = f"{self.prefix}.{place}{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def number(self, place: str, value: Any, like: str) -> str:
        """A constant of the type of another value."""
        return self.add(place, "CastLike", self.constant(np.asarray(value, np.float32)), like)

    def raw(self, k: int = 0) -> str:
        """What the copy computes, to be replaced by :meth:`instead`."""
        return f"{self.prefix}.raw{k}"

    def instead(self, name: str, k: int = 0) -> None:
        self.replaced[k] = name

    def shape(self, k: int) -> tuple[int, ...]:
        """Of a stored input."""
        return next(tuple(t.dims) for t in self.model.graph.initializer if t.name == self.node.input[k])

    def attribute(self, name: str, value: Any) -> None:
        kept = [a for a in self.copy.attribute if a.name != name]
        del self.copy.attribute[:]
        self.copy.attribute.extend([*kept, helper.make_attribute(name, value)])

    def put_in(self, when: Callable[[Wrong], str] | None) -> None:
        """In place of the node, or beside it where it is wrong under a condition only."""
        graph = self.model.graph
        k = next(i for i, n in enumerate(graph.node) if n is self.node or n == self.node)
        names = list(self.node.output)
        made = [*self.before, self.copy, *self.after]
        for i, name in enumerate(names):
            if name:
                self.copy.output[i] = self.raw(i) if i in self.replaced or when else name
        if when:
            condition = when(self)
            made = [*self.before, self.copy, *self.after]
            right = onnx.NodeProto()
            right.CopyFrom(self.node)
            right.output[:] = [f"{n}.right" if n else "" for n in names]
            made.append(right)
        for i, name in enumerate(names):
            if name and when:
                wrong = self.replaced.get(i, self.raw(i))
                made.append(
                    helper.make_node("Where", [condition, wrong, right.output[i]], [name], name=f"{name}.chosen")
                )
            elif i in self.replaced:
                made.append(helper.make_node("Identity", [self.replaced[i]], [name], name=f"{name}.chosen"))
        del graph.node[k]
        for node in reversed(made):
            graph.node.insert(k, node)
        graph.initializer.extend(self.constants)


Change = Callable[[Wrong], None]
When = Callable[[Wrong], str]


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong.

    Attributes:
        operators: that it computes.
        change: what is wrong.
        layer: where; None for every layer, or none.
        when: the condition under which it is; None for always.
        among: which of the nodes of a layer, by a pattern in the name; "" for all.
        precision: of an export that has the operator.
    """

    operators: tuple[str, ...]
    change: Change
    layer: int | None = None
    when: When | None = None
    among: str = ""
    precision: str = "fp32"

    @property
    def operator(self) -> str:
        return self.operators[0]

    def hits(self, node: Any) -> bool:
        name = node.name
        here = self.layer is None or re.search(rf"layers\.{self.layer}[./]", name) is not None
        return node.op_type in self.operators and here and re.search(self.among, name) is not None

    def apply(self, model: Any) -> Any:
        """The model, changed in place."""
        for node in [n for n in model.graph.node if self.hits(n)]:
            wrong = Wrong(model, node)
            self.change(wrong)
            wrong.put_in(self.when)
        return model


# -- conditions ------------------------------------------------------------------------------------------------------


def _size(axis: int, op: str, number: int) -> When:
    def when(w: Wrong) -> str:
        x = w.node.input[1 if w.node.op_type == "Gather" else 0]
        shape = w.add("after", "Shape", x, start=axis, end=axis + 1)
        return w.add("after", op, shape, w.constant(np.array([number], np.int64)))

    return when


def _longer(tokens: int) -> When:
    """An attention over more tokens in all."""

    def when(w: Wrong) -> str:
        total = w.add("after", "Cast", w.node.input[6], to=7)
        return w.add("after", "Greater", total, w.constant(np.array(tokens, np.int64)))

    return when


in_batches = _size(0, "Greater", 1)
in_decode = _size(1, "Equal", 1)
in_prefill = _size(1, "Greater", 1)


# -- what is wrong ---------------------------------------------------------------------------------------------------


def _attribute(name: str, value: Any) -> Change:
    def change(w: Wrong) -> None:
        old = {a.name: helper.get_attribute_value(a) for a in w.node.attribute}.get(name)
        w.attribute(name, value(old) if callable(value) else value)

    return change


def _input_times(k: int, factor: float) -> Change:
    def change(w: Wrong) -> None:
        x = w.node.input[k]
        w.copy.input[k] = w.add("before", "Mul", x, w.number("before", factor, x))

    return change


def _output_times(factor: float, k: int = 0) -> Change:
    return lambda w: w.instead(w.add("after", "Mul", w.raw(k), w.number("after", factor, w.raw(k))), k)


def _one_scale(w: Wrong) -> None:
    """The scale of the first block of one row of a quantised weight is read three times too large."""
    factors = np.ones(w.shape(2), np.float32)
    factors.reshape(-1)[factors.size // 2] = 3
    w.copy.input[2] = w.add("before", "Mul", w.node.input[2], w.number("before", factors, w.node.input[2]))


def _one_zero_point(w: Wrong) -> None:
    """One byte of packed zero points, or the zero point that is not stored, is read as another."""
    at = {a.name: a.i for a in w.node.attribute}
    blocks = -(-at["K"] // at["block_size"])
    per_row = -(-blocks * at["bits"] // 8)
    if len(w.node.input) > 3 and w.node.input[3]:
        dims = w.shape(3)
        mask = np.zeros(dims, bool)
        mask.reshape(-1)[mask.size // 2] = True
        w.copy.input[3] = w.add(
            "before", "Where", w.constant(mask), w.constant(np.zeros(dims, np.uint8)), w.node.input[3]
        )
        return
    middle = np.full(at["N"] * per_row, 0x88 if at["bits"] == 4 else 0x80, np.uint8)
    middle[middle.size // 2] ^= 0x33
    w.copy.input.append(w.constant(middle.reshape(at["N"], per_row) if at["bits"] == 8 else middle))


def _one_column(w: Wrong) -> None:
    """One column of a product is 5 % too large."""
    x = w.raw()
    size = w.add("after", "Shape", x, start=-1)
    column = w.add("after", "Range", w.constant(np.int64(0)), w.add("after", "Squeeze", size), w.constant(np.int64(1)))
    here = w.add("after", "Equal", column, w.constant(np.int64(3)))
    larger = w.add("after", "Mul", x, w.number("after", 1.05, x))
    w.instead(w.add("after", "Where", here, larger, x))


def _last_term_missing(w: Wrong) -> None:
    """The last terms of each dot product are left out, as where a loop over whole vectors forgets the rest."""
    x, width = w.node.input[0], w.shape(1)[0]
    mask = np.ones(width, np.float32)
    mask[-3:] = 0
    w.copy.input[0] = w.add("before", "Mul", x, w.number("before", mask, x))


def _positions_off(w: Wrong) -> None:
    """Every token is rotated as the next one."""
    for k in (7, 8) if w.node.op_type == "GroupQueryAttention" else (1, 2):
        table = w.node.input[k]
        one, end = w.constant(np.array([1], np.int64)), w.constant(np.array([1 << 40], np.int64))
        rest = w.add("before", "Slice", table, one, end, w.constant(np.array([0], np.int64)))
        last = w.add("before", "Slice", table, w.constant(np.array([-1], np.int64)), end, w.constant(np.array([0])))
        w.copy.input[k] = w.add("before", "Concat", rest, last, axis=0)


def _rolled(k: int) -> Change:
    """The cache is written one slot further on."""

    def change(w: Wrong) -> None:
        x = w.raw(k)
        axis, last = w.constant(np.array([2], np.int64)), w.constant(np.array([-1], np.int64))
        end, start = w.constant(np.array([1 << 40], np.int64)), w.constant(np.array([0], np.int64))
        back = w.add("after", "Slice", x, last, end, axis)
        w.instead(w.add("after", "Concat", back, w.add("after", "Slice", x, start, last, axis), axis=2), k)

    return change


def _not_written(k: int) -> Change:
    """The new tokens' slots of the cache stay 0, wherever in the buffer they are."""

    def change(w: Wrong) -> None:
        x = w.raw(k)
        zero, one = w.constant(np.int64(0)), w.constant(np.int64(1))
        new = w.add("after", "Squeeze", w.add("after", "Shape", w.node.input[0], start=1, end=2))
        room = w.add("after", "Squeeze", w.add("after", "Shape", x, start=2, end=3))
        total = w.add("after", "Cast", w.node.input[6], to=7)
        slots = w.add("after", "Range", zero, room, one)
        first = w.add("after", "GreaterOrEqual", slots, w.add("after", "Sub", total, new))
        lost = w.add("after", "And", first, w.add("after", "Less", slots, total))
        lost = w.add("after", "Unsqueeze", lost, w.constant(np.array([-1], np.int64)))
        w.instead(w.add("after", "Where", lost, w.number("after", 0.0, x), x), k)

    return change


def _scatter_lost(w: Wrong) -> None:
    w.instead(w.add("after", "Identity", w.node.input[0]))


def _some_rows(w: Wrong) -> None:
    """One row of sixteen in the embedding is half of what it is."""
    ids = w.add("after", "Mod", w.node.input[1], w.constant(np.int64(16)))
    here = w.add("after", "Equal", ids, w.constant(np.int64(7)))
    here = w.add("after", "Unsqueeze", here, w.constant(np.array([-1], np.int64)))
    x = w.raw()
    w.instead(w.add("after", "Where", here, w.add("after", "Mul", x, w.number("after", 0.5, x)), x))


def _top_two_exchanged(w: Wrong) -> None:
    x = w.raw()
    name = f"{w.prefix}.top"
    two = w.constant(np.array([2], np.int64))
    w.after.append(helper.make_node("TopK", [x, two], [f"{name}.values", f"{name}.places"], name=name, axis=-1))
    swap = w.constant(np.array([1, 0], np.int64))
    values = w.add("after", "Gather", f"{name}.values", swap, axis=-1)
    w.instead(w.add("after", "ScatterElements", x, f"{name}.places", values, axis=-1))


def _hard_sigmoid(w: Wrong) -> None:
    w.copy.op_type = "HardSigmoid"


def _nan(w: Wrong) -> None:
    _output_times(float("nan"))(w)


GQA = ("GroupQueryAttention",)
NORM = ("SkipSimplifiedLayerNormalization", "RMSNormalization")
LAST_NORM = "^/model/norm/"
MATMUL = ("MatMul",)
NBITS = ("MatMulNBits",)

FAULTS: dict[str, Fault] = {
    "norm weight times 1.02": Fault(NORM, _input_times(2, 1.02), HERE),
    "norm output times 1.01, every layer": Fault(NORM, _output_times(1.01)),
    "norm epsilon 1e-3": Fault(NORM, _attribute("epsilon", 1e-3), HERE),
    "norm epsilon 1e-3, every layer": Fault(NORM, _attribute("epsilon", 1e-3)),
    "norm wrong in batches": Fault(NORM, _output_times(1.05), HERE, in_batches),
    "sum of the residual wrong": Fault(NORM[:1], _output_times(1.02, 3), HERE),
    "residual left out": Fault(NORM[:1], _input_times(1, 0.0), HERE, among="Normalization$"),
    "sine of the rotary table times 1.05": Fault(GQA, _input_times(8, 1.05), HERE),
    "rotary halves interleaved": Fault(GQA, _attribute("rotary_interleaved", 1), HERE),
    "rotary halves interleaved, every layer": Fault(GQA, _attribute("rotary_interleaved", 1)),
    "rotary position off by one": Fault(GQA, _positions_off, HERE),
    "rotary position off by one in decode": Fault(GQA, _positions_off, HERE, in_decode),
    "attention scale off by 2 %": Fault(GQA, _attribute("scale", lambda s: 1.02 * s), HERE),
    "attention scale off by 2 % in batches": Fault(GQA, _attribute("scale", lambda s: 1.02 * s), HERE, in_batches),
    "attention scale off beyond 64 tokens": Fault(GQA, _attribute("scale", lambda s: 1.1 * s), HERE, _longer(64)),
    "softcap of 5": Fault(GQA, _attribute("softcap", 5.0), HERE),
    "softmax over the last 16 tokens": Fault(GQA, _attribute("local_window_size", 16), HERE),
    "softmax over the last 16 tokens in decode": Fault(GQA, _attribute("local_window_size", 16), HERE, in_decode),
    "attention output NaN beyond 90 tokens": Fault(GQA, _nan, HERE, _longer(90)),
    "key written one slot off": Fault(GQA, _rolled(1), HERE, in_decode),
    "value not written": Fault(GQA, _not_written(2), HERE),
    "value not written in decode, every layer": Fault(GQA, _not_written(2), None, in_decode),
    "last terms of a product missing": Fault(MATMUL, _last_term_missing, HERE, among="down_proj"),
    "one column of a product wrong": Fault(MATMUL, _one_column, HERE, among="o_proj"),
    "product wrong in prefill": Fault(MATMUL, _output_times(1.01), HERE, in_prefill, "gate_proj"),
    "product wrong in decode": Fault(MATMUL, _output_times(1.01), HERE, in_decode, "up_proj"),
    "HardSigmoid for Sigmoid": Fault(("Sigmoid",), _hard_sigmoid, HERE),
    "Sigmoid wrong in every layer": Fault(("Sigmoid",), _output_times(0.99)),
    "product of gate and up wrong": Fault(("Mul",), _output_times(1.01), HERE, among=r"layers\.\d+/Mul$"),
    "embedding rows of some ids": Fault(("Gather",), _some_rows, among="embed_tokens"),
    "head wrong in one column": Fault(MATMUL, _one_column, among="lm_head"),
    "top two logits exchanged": Fault(MATMUL, _top_two_exchanged, among="lm_head"),
    "one block's scale": Fault(NBITS, _one_scale, HERE, among="o_proj", precision="int4"),
    "one block's scale in decode": Fault(NBITS, _one_scale, HERE, in_decode, "down_proj", "int4"),
    "one block's zero point": Fault(NBITS, _one_zero_point, HERE, among="qkv_proj", precision="int4"),
    "quantised product wrong, every layer": Fault(NBITS, _output_times(1.1), precision="int4"),
}
"""In the fused graph of a LLaMA."""

TENSORRT_FAULTS: dict[str, Fault] = {
    "attention scale off by 2 %": Fault(("Attention",), _attribute("scale", lambda s: 1.02 * s), HERE),
    "rotary halves interleaved": Fault(("RotaryEmbedding",), _attribute("interleaved", 1), HERE),
    "cache not written": Fault(("TensorScatter",), _scatter_lost, HERE),
    "norm epsilon 1e-3": Fault(("RMSNormalization",), _attribute("epsilon", 1e-3), HERE),
    "one column of a product wrong": Fault(MATMUL, _one_column, HERE, among="o_proj"),
}
"""In the graph of standard operators."""


# -- where they run --------------------------------------------------------------------------------------------------


def faulty_session(real: Any, fault: Fault) -> Any:
    """A class like ``onnxruntime.InferenceSession`` that has the fault."""

    class InferenceSession(real):  # type: ignore[misc]
        def __init__(self, path_or_bytes: Any, *more: Any, **options: Any) -> None:
            if isinstance(path_or_bytes, bytes):
                changed = fault.apply(onnx.load_from_string(path_or_bytes))
                super().__init__(changed.SerializeToString(), *more, **options)
                return
            path = Path(path_or_bytes)
            model = onnx.load(path, load_external_data=False)
            if not any(fault.hits(n) for n in model.graph.node):
                super().__init__(path_or_bytes, *more, **options)
                return
            stored = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
            with tempfile.TemporaryDirectory() as work:  # what the session has mapped outlives the file's name
                for name in stored:
                    _link(path.parent / name, Path(work) / name)
                onnx.save_model(fault.apply(model), Path(work) / path.name)
                super().__init__(str(Path(work) / path.name), *more, **options)

    return InferenceSession


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class LocalRunner:
    """The installed ONNX Runtime in this process, with a fault or without one: a ``bench.matrix.differ.Runner``."""

    def __init__(
        self,
        label: str = "right",
        fault: Fault | None = None,
        options: Mapping[str, str] | None = None,
        error: type[Exception] = RuntimeError,
    ) -> None:
        import onnxruntime as ort

        self.label, self._ort, self._options, self._error = label, ort, options or {}, error
        self._open = faulty_session(ort.InferenceSession, fault) if fault else ort.InferenceSession
        self.runs = 0

    def run(
        self, graph: Path, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, optimise: bool = True
    ) -> dict[str, NDArray[Any]]:
        self.runs += 1
        options = self._ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        if not optimise:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in self._options.items():
            options.add_session_config_entry(key, value)
        try:
            session = self._open(str(graph), options, providers=["CPUExecutionProvider"])
            names = {i.name for i in session.get_inputs()}
            found = session.run(list(outputs), {k: v for k, v in feeds.items() if k in names})
        except Exception as e:
            raise self._error(str(e).splitlines()[0]) from None
        return dict(zip(outputs, found, strict=True))


_SITECUSTOMIZE = """
import importlib.util, os, sys
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
spec = importlib.util.spec_from_file_location("faults", {path!r})
faults = sys.modules["faults"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
fault = faults.{catalogue}[{name!r}]
onnxruntime.InferenceSession = faults.faulty_session(onnxruntime.InferenceSession, fault)
"""


def faulty_environment(folder: Path, name: str, catalogue: str = "FAULTS") -> Path:
    """A virtual environment at ``folder`` with everything of the running one and the fault of that name.

    Returns:
        its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    (site / "running.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    text = _SITECUSTOMIZE.format(path=str(Path(__file__).resolve()), name=name, catalogue=catalogue)
    (site / "sitecustomize.py").write_text(text)
    return python
