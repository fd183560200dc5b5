"""Two runtimes over one folder: every fault is found, in its layer and its operator, and equal ones show nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bench.errors import BenchError
from bench.matrix.differ import Difference, Runner, RunnerError, differ
from runtime.loading import read_folder
from runtime.ort_session import accuracy_level
from tests.bench.matrix import faults
from tests.bench.matrix.faults import FAULTS, TENSORRT_FAULTS, Fault, LocalRunner

IDS = [(7 * k * k + 3 * k) % 324 + 7 for k in range(150)]
TENSORRT = {"target": "tensorrt", "activations": "fp32"}


def right(folder: Path) -> LocalRunner:
    return LocalRunner("right", None, accuracy_level(read_folder(folder, verify=False)), RunnerError)


def find(folder: Path, other: Fault | Runner | None) -> Difference | None:
    manifest = read_folder(folder, verify=False)
    if not isinstance(other, LocalRunner | Sometimes):
        other = LocalRunner("wrong", other, accuracy_level(manifest), RunnerError)
    return differ(folder, manifest, right(folder), other, IDS)


class Sometimes:
    """A runner that is wrong where ``wrong(model, feeds, optimise)`` says what it does: an error, or a factor."""

    label = "sometimes"

    def __init__(self, folder: Path, wrong: Callable[[Any, Mapping[str, Any], bool], str | float | None]) -> None:
        self._inner, self._wrong = right(folder), wrong

    def run(self, graph: Path, feeds: Any, outputs: Sequence[str], *, optimise: bool = True) -> Any:
        found = self._inner.run(graph, feeds, outputs, optimise=optimise)
        does = self._wrong(onnx.load(graph, load_external_data=False), feeds, optimise)
        if isinstance(does, str):
            raise RunnerError(does)
        return found if does is None else {name: value * does for name, value in found.items()}


def has(model: Any, op: str, count: int = 1) -> bool:
    return sum(n.op_type == op for n in model.graph.node) >= count


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_in_its_layer(name: str, exports: Callable[..., Path]) -> None:
    fault = FAULTS[name]
    found = find(exports(fault.precision), fault)
    assert found is not None
    assert found.op_type in fault.operators
    assert fault.layer is None or found.layer == fault.layer
    assert found.case is not None
    assert len(found.case.model.graph.node) == 1


@pytest.mark.parametrize("name", TENSORRT_FAULTS)
def test_each_fault_of_standard_operators_is_found(name: str, exports: Callable[..., Path]) -> None:
    fault = TENSORRT_FAULTS[name]
    found = find(exports(spec=TENSORRT), fault)
    assert found is not None
    assert (found.layer, found.op_type) == (1, fault.operator)


@pytest.mark.parametrize(
    ("precision", "spec"),
    [
        ("fp32", {}),
        ("fp16", {}),
        ("int8", {"keep_float": "none"}),
        ("int4", {}),
        ("int4", TENSORRT),
        ("fp32", {"target": "plain"}),
    ],
)
def test_equal_runtimes_do_not_differ(precision: str, spec: dict[str, Any], exports: Callable[..., Path]) -> None:
    assert find(exports(precision, spec), None) is None


def test_a_product_over_dequantised_weights_is_one_thing(exports: Callable[..., Path]) -> None:
    """ONNX Runtime makes MatMulNBits of the two nodes, in a cut as well."""
    fault = Fault(("DequantizeLinear",), faults._output_times(1.1), among=r"layers\.1\..*o_proj")
    found = find(exports("int4", TENSORRT), fault)
    assert found is not None
    assert found.case is not None
    assert found.layer == 1
    assert "o_proj" in found.node
    assert [n.op_type for n in found.case.model.graph.node] == ["DequantizeLinear", "MatMul"]


@pytest.mark.parametrize(("architecture", "layer"), [("gpt_neo", 2), ("qwen2", 1), ("falcon", 1)])
def test_a_plain_graph_of_another_architecture(
    architecture: str, layer: int, decoders: Callable[[str], tuple[Path, Path]]
) -> None:
    pattern = rf"/(layers|h)\.{layer}/.*(down_proj|c_proj|dense_4h_to_h)/MatMul"
    found = find(decoders(architecture)[1], Fault(("MatMul",), faults._output_times(1.01), among=pattern))
    assert found is not None
    assert (found.layer, found.op_type) == (layer, "MatMul")


def test_what_the_reference_cannot_run_is_left_out(exports: Callable[..., Path]) -> None:
    """Neither it nor the step that would go on from its cache."""

    def refuse(_model: Any, feeds: Mapping[str, Any], _optimise: bool) -> str | None:
        ids = feeds.get("input_ids")
        return "no such batch" if ids is not None and (len(ids) > 1 or ids.shape[1] > 90) else None

    reference, folder = Sometimes(exports(), refuse), exports()
    assert differ(folder, read_folder(folder, verify=False), reference, right(folder), IDS) is None


def test_a_crash_is_followed_to_its_node(exports: Callable[..., Path]) -> None:
    def crash(model: Any, feeds: Mapping[str, Any], optimise: bool) -> str | None:
        past = [v for n, v in feeds.items() if n == "past_key_values.1.key"]
        return "signal 11" if past and past[0].shape[2] and has(model, "GroupQueryAttention") else None

    found = find(exports(), Sometimes(exports(), crash))
    assert found is not None
    assert (found.layer, found.op_type, found.error) == (1, "GroupQueryAttention", "signal 11")
    assert found.scenario == "a decode step after 96 tokens"
    assert found.what.endswith("signal 11")


def test_a_refused_operator_is_named(exports: Callable[..., Path]) -> None:
    class Refusing(Sometimes):
        def run(self, graph: Path, feeds: Any, outputs: Sequence[str], *, optimise: bool = True) -> Any:
            if has(onnx.load(graph, load_external_data=False), "GroupQueryAttention"):
                raise RunnerError(f"Load model from {graph} failed: no such operator")
            return super().run(graph, feeds, outputs, optimise=optimise)

    found = find(exports(), Refusing(exports(), lambda *_: None))
    assert found is not None
    assert (found.layer, found.op_type, found.error) == (0, "GroupQueryAttention", found.error)
    assert re.fullmatch(r"Load model from cut\d\.onnx failed: no such operator", found.error)  # no path of this machine


def test_a_runtime_that_opens_nothing_of_this_version(exports: Callable[..., Path]) -> None:
    found = find(exports(), Sometimes(exports(), lambda *_: "Unsupported model IR version"))
    assert found is not None
    assert (found.layer, found.node, found.case) == (None, "", None)
    assert "opens no model of this opset or IR version" in found.what


def test_nodes_that_are_wrong_only_together(exports: Callable[..., Path]) -> None:
    """As a fusion would be; the smallest stretch is named, and that it is the optimiser's doing."""

    def fused(model: Any, _feeds: Any, optimise: bool) -> float | None:
        made = {n.name: n.output[0] for n in model.graph.node}
        first = made.get("/model/layers.1/act_fn/Sigmoid", "")
        joined = any(first in n.input for n in model.graph.node if first) and "/model/layers.1/Mul" in made
        return 1.5 if optimise and joined else None

    found = find(exports(), Sometimes(exports(), fused))
    assert found is not None
    assert found.case is not None
    assert found.layer == 1
    assert found.node == ""
    assert "each alone is right" in found.what
    assert found.what.count("only after graph optimisation") == 1
    assert len(found.case.model.graph.node) <= 4


def test_only_the_whole_graph_differs(exports: Callable[..., Path]) -> None:
    whole = Sometimes(exports(), lambda m, _f, o: 1.5 if o and m.graph.name != "cut" else None)
    found = find(exports(), whole)
    assert found is not None
    assert (found.layer, found.case) == (None, None)
    assert found.what.startswith("the whole graph, and no part of it that was cut out, only after graph optimisation")


def test_weights_inside_of_the_file_are_moved_out_once(exports: Callable[..., Path], tmp_path: Path) -> None:
    """A third-party folder with one file; what is reported holds its own weights."""
    folder = tmp_path / "whole"
    shutil.copytree(exports(), folder)
    (folder / "manifest.json").unlink()
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(model, folder / "model.onnx")
    for name in ("model.onnx.data", "model_scoring.onnx"):
        (folder / name).unlink()
    model.graph.initializer.append(helper.make_tensor("padding", 1, [300_000], np.zeros(300_000, np.float32)))
    onnx.save_model(model, folder / "model.onnx")
    found = find(folder, FAULTS["one column of a product wrong"])
    assert found is not None
    assert found.case is not None
    assert (found.layer, found.op_type) == (1, "MatMul")
    assert all(t.raw_data for t in found.case.model.graph.initializer)


def test_a_short_text_is_refused(exports: Callable[..., Path]) -> None:
    manifest = read_folder(exports(), verify=False)
    with pytest.raises(BenchError, match="5 tokens are too few"):
        differ(exports(), manifest, right(exports()), right(exports()), IDS[:5])


def test_the_folder_is_left_as_it_was(exports: Callable[..., Path]) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in exports().iterdir()}
    find(exports(), FAULTS["softcap of 5"])
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in exports().iterdir()} == before
