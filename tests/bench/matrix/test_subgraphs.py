"""A graph taken apart: layers, segments, and cuts that compute what the whole computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import parser

from bench.matrix.rounding import gap, limit_of_node
from bench.matrix.scenarios import Scenario, scenarios
from bench.matrix.subgraphs import ALONE, Subgraphs
from runtime.loading import read_folder
from tests.bench.matrix.faults import FAMILY, LocalRunner

TENSORRT = {"target": "tensorrt", "activations": "fp32"}
IDS = [(7 * k * k + 3 * k) % 324 + 7 for k in range(150)]
INSIDE = re.compile(r"(?:layers|h|blocks)\.(\d+)[./]")


def named_layer(node: Any) -> int | None:
    """The layer that a node's own name says it is in; None for residual additions, which stand between two."""
    residual = node.op_type == "Add" and not re.search(r"(proj|attn|attention|mlp|norm|h)/", node.name)
    found = [m for m in [INSIDE.search(node.name)] if m and not residual]
    return int(found[0].group(1)) if found else None


@pytest.mark.parametrize("spec", [{}, TENSORRT, {"target": "plain"}], ids=["ort", "tensorrt", "plain"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["llama", *FAMILY])
def test_layers_are_those_of_the_names(
    name: str, spec: dict[str, Any], layers: int, exports: Callable[..., Path]
) -> None:
    with Subgraphs(exports(spec=spec, num_hidden_layers=layers, **FAMILY.get(name, {})) / "model.onnx") as parts:
        named = {k: layer for k, node in enumerate(parts.nodes) if (layer := named_layer(node)) is not None}
        told = {k: parts.layer(k) for (k,) in parts.units}
        wrong = {parts.nodes[k].name for k, layer in named.items() if k in told and told[k] != layer}
        heads = {n.name for k, n in enumerate(parts.nodes) if "lm_head" in n.name and parts.layer(k) is not None}
    assert set(named.values()) == set(range(layers))
    assert not wrong
    assert not heads


@pytest.mark.parametrize("architecture", ["gpt_neo", "gpt2", "gptj", "qwen2", "falcon"])
def test_layers_of_other_architectures(architecture: str, decoders: Callable[[str], tuple[Path, Path]]) -> None:
    with Subgraphs(decoders(architecture)[1] / "model.onnx") as parts:
        products = [k for (k,) in parts.units if parts.nodes[k].op_type in ("MatMul", "Gemm", "Softmax")]
        named = {k: layer for k in products if (layer := named_layer(parts.nodes[k])) is not None}
        assert len(named) > 5
        assert {k: parts.layer(k) for k in named} == named


def test_segments_are_between_residuals(exports: Callable[..., Path]) -> None:
    with Subgraphs(exports() / "model.onnx") as parts:
        ends = [parts.nodes[s[-1]].op_type for s in parts.segments]
        together = [k for s in parts.segments for k in s]
    assert ends[:5] == ["Gather", *["SkipSimplifiedLayerNormalization"] * 4]  # halves of two layers
    assert together == [k for (k,) in parts.units]


def test_a_segment_alone_computes_what_the_whole_computes(exports: Callable[..., Path]) -> None:
    folder = exports()
    manifest, runner = read_folder(folder, verify=False), LocalRunner()
    prompt = next(scenarios(manifest, IDS, lambda *_: {}))
    with Subgraphs(folder / prompt.graph) as parts:
        shown = [name for segment in parts.segments for name in parts.made(segment)]
        whole = parts.cut([tuple(k for s in parts.segments for k in s)], prompt.feeds, shown)
        values = prompt.feeds | runner.run(parts.write(whole), prompt.feeds, shown)
        each = parts.cut(parts.segments, values, shown)
        given = {i.name: values[i.name] for i in each.graph.input}
        alone = runner.run(parts.write(each), given, [name + ALONE for name in shown])
        data = folder / manifest.data_file
        assert (parts.folder / manifest.data_file).stat().st_ino == data.stat().st_ino
    assert max(gap(prompt.counted(alone[n + ALONE]), prompt.counted(values[n])) for n in shown) < 1e-6
    assert not parts.folder.exists()


def test_constants_go_with_their_reader(tmp_path: Path) -> None:
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[2] input_ids, bool take) => (float[2] y) <float[2] w = {1, 2}> {
            doubled = Add(w, w)
            x = Mul(input_ids, doubled)
            y = If (take) <
                then_branch = t () => (float[2] a) { a = Add(x, doubled) },
                else_branch = e () => (float[2] b) { b = Neg(x) }
            >
        }
        """
    )
    onnx.save_model(model, tmp_path / "model.onnx")
    with Subgraphs(tmp_path / "model.onnx") as parts:
        assert parts.units == [(1,), (2,)]
        assert set(parts.given((2,))) == {"x", "take"}
        values: dict[str, NDArray[Any]] = {"x": np.array([1, 1], np.float32), "take": np.array(True)}
        cut = parts.cut([(2,)], values, ["y"])
        found = LocalRunner().run(parts.write(cut), values, ["y"])
    assert [n.op_type for n in cut.graph.node] == ["Add", "If"]
    assert found["y"].tolist() == [3, 5]


def of(shape: tuple[int, ...], new: Any, slots: Any) -> NDArray[Any]:
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Scenario("", "", {}, np.array(new, bool), np.array(slots, bool)).counted(value)


def test_only_tokens_count() -> None:
    new = [[1, 1, 1], [1, 0, 0]]
    assert of((2, 3, 5), new, new).shape == (4, 5)
    assert of((2, 4, 3, 5), new, new).shape == (4 * 4, 5)  # heads in front of tokens
    assert of((2, 4, 9, 5), [[1], [1]], new).shape == (4 * 4, 5)  # a cache with room, of which 4 slots hold tokens
    assert of((7,), new, new).shape == (1, 7)
    assert of((), new, new).shape == (1, 1)


@pytest.fixture
def all_scenarios(exports: Callable[..., Path]) -> Callable[..., Iterator[Scenario]]:
    def get(ids: list[int], **spec: Any) -> Iterator[Scenario]:
        folder = exports(spec=spec)
        manifest, runner = read_folder(folder, verify=False), LocalRunner()
        yield from scenarios(manifest, ids, lambda s, names: runner.run(folder / s.graph, s.feeds, names))

    return get


def test_every_run_that_the_text_allows(all_scenarios: Any) -> None:
    names = [s.name for s in all_scenarios(IDS)]
    assert names == [
        "a prompt of 24 tokens",
        "a prompt of 96 tokens",
        "a prompt of 142 tokens",
        "a decode step after 96 tokens",
        "a decode step after 142 tokens",
        "8 new tokens after 96",
        "an uneven batch of 3 rows, 38 to 96 tokens",
        "a decode step of that batch of 3",
    ]
    assert [s.name for s in all_scenarios(IDS[:20])][:2] == ["a prompt of 12 tokens", "a decode step after 12 tokens"]


@pytest.mark.parametrize("spec", [{}, TENSORRT, {"target": "plain"}], ids=["ort", "tensorrt", "plain"])
def test_a_step_says_what_the_whole_prompt_says(spec: dict[str, Any], exports: Callable[..., Path]) -> None:
    """The past, the mask and the positions of each later run are right: its logits are those of one long prompt."""
    folder = exports(spec=spec)
    manifest, runner = read_folder(folder, verify=False), LocalRunner()
    seen: list[Scenario] = []

    def run(s: Scenario, names: Any) -> Any:
        return runner.run(folder / s.graph, s.feeds, names)

    seen.extend(scenarios(manifest, IDS, run))
    by_name = {s.name: run(s, ["logits"])["logits"] for s in seen}
    whole = make_logits(folder, manifest, runner)
    assert gap(by_name["a decode step after 96 tokens"][0, -1:], whole(IDS[:97])[96:97]) < 1e-5
    assert gap(by_name["8 new tokens after 96"][0], whole(IDS[:104])[96:]) < 1e-5
    step = by_name["a decode step of that batch of 3"]
    for k, length in enumerate((96, 67, 38)):
        assert gap(step[k, -1:], whole(IDS[k : k + length + 1])[length : length + 1]) < 1e-5


def make_logits(folder: Path, manifest: Any, runner: Any) -> Callable[[list[int]], NDArray[Any]]:
    from runtime.probe import GraphProbe

    probe = GraphProbe(folder / manifest.scoring_graph, manifest, 1)
    return lambda ids: probe.run(ids)["logits"][0]


def test_rounding_of_whole_numbers_and_of_nan() -> None:
    a = np.array([[1, 2, 3]])
    assert gap(a, a) == 0
    assert gap(a, a + 1) == float("inf")
    assert gap(a.astype(np.uint8), a.astype(np.uint8) + 1) == 0
    x = np.array([[1.0, np.nan, -np.inf]], np.float32)
    assert gap(x, x) == 0
    assert gap(x, np.array([[1.0, 2.0, -np.inf]], np.float32)) == float("inf")
    assert gap(np.array([[1.0, 2.0, -np.inf]], np.float32), x) == float("inf")
    large = np.full((1, 4), -1.7e38, np.float32)
    assert gap(large, large) == 0


def test_one_wrong_element_of_a_long_row_shows() -> None:
    b = np.ones((1, 10_000), np.float32)
    a = b.copy()
    a[0, 7] = 1.16
    assert gap(a, b) == pytest.approx(0.01, rel=1e-2)  # 0.16 over twice the usual size, by 8; its norm moves by 0.0016


def test_limits_grow_with_the_sum() -> None:
    assert limit_of_node("MatMul", 0, np.dtype(np.float32), 64) == pytest.approx(1e-5)
    assert limit_of_node("MatMul", 0, np.dtype(np.float32), 6400) == pytest.approx(1e-4)
    assert limit_of_node("MatMulNBits", 4, np.dtype(np.float32), 64) == 2e-2
    assert limit_of_node("Add", 4, np.dtype(np.float32), 64) == pytest.approx(1e-5)
    assert limit_of_node("Shape", 0, np.dtype(np.int64), 64) == 0
