"""Decisions by ids, places and lengths in third-party graphs: right exports have none, each defect is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from transformers import AutoConfig

from bench.gate.checks.graph import graph
from bench.gate.control import unexplained
from bench.gate.modes import MODES
from bench.gate.validate import make_subject

Folders = Callable[..., Path]
Decoders = Callable[[str], tuple[Path, Path]]
Change = Callable[[Any], None]


def _models(folder: Path) -> list[Any]:
    return [onnx.load(p, load_external_data=False) for p in sorted(folder.glob("*.onnx"))]


@pytest.mark.parametrize(
    ("precision", "spec"),
    [
        ("fp32", {}),
        ("fp16", {}),
        ("fp32", {"target": "plain"}),
        ("fp32", {"target": "tensorrt"}),
        ("int4", {"method": "hqq", "keep_float": "none"}),
    ],
)
def test_right_exports_have_none(exports: Folders, checkpoints: Folders, precision: str, spec: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(checkpoints())
    for model in _models(exports(precision, spec=spec)):
        assert unexplained(model, config) == []


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "qwen2"])
def test_right_exports_of_other_architectures_have_none(decoders: Decoders, name: str) -> None:
    checkpoint, folder = decoders(name)
    for model in _models(folder):
        assert unexplained(model, AutoConfig.from_pretrained(checkpoint)) == []


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("target", ["plain", "ort"])
def test_graphs_that_onnxruntime_saved_have_none(
    exports: Folders, checkpoints: Folders, tmp_path: Path, level: str, target: str
) -> None:
    import onnxruntime as ort

    folder = tmp_path / "folder"
    shutil.copytree(exports(spec={"target": target}), folder)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(folder / "saved.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "saved.onnx", load_external_data=False)
    assert unexplained(model, AutoConfig.from_pretrained(checkpoints())) == []


def constant(model: Any, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def add(model: Any, op: str, inputs: list[str], out: str, **attributes: Any) -> str:
    model.graph.node.append(helper.make_node(op, inputs, [out], name=out, **attributes))
    return out


def renamed_logits(model: Any) -> str:
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[list(last.output).index("logits")] = "before"
    return "before"


def one_word(model: Any) -> None:
    """NaN wherever one token id is in the prompt."""
    here = add(model, "Equal", ["input_ids", constant(model, "word", np.int64(42))], "here")
    some = add(model, "ReduceMax", [add(model, "Cast", [here], "as float", to=1)], "some", keepdims=0)
    rest = add(model, "Sub", [constant(model, "one", np.float32(1)), some], "rest")
    add(model, "Div", [renamed_logits(model), rest], "logits")


def by_length(threshold: int, op: str) -> Change:
    """The logits change with the number of tokens so far: beyond a threshold, or at each multiple of it."""

    def change(model: Any) -> None:
        length = add(model, "ReduceSum", ["attention_mask"], "so far", keepdims=0)
        number = constant(model, "number", np.int64(threshold))
        if op == "Mod":
            rest = add(model, "Mod", [length, number], "rest")
            hit = add(model, "Equal", [rest, constant(model, "nil", np.int64(0))], "hit")
        elif op == "Div":
            hit = add(model, "Cast", [add(model, "Div", [length, number], "times")], "hit", to=9)
        else:
            hit = add(model, op, [length, number], "hit")
        before = renamed_logits(model)
        add(model, "Where", [hit, add(model, "Neg", [before], "other"), before], "logits")

    return change


def lost_cache(model: Any) -> None:
    """Keys before the last 100 are cut off where the cache is read, by nodes that stand behind their readers."""
    cache, nodes = "past_key_values.1.key", len(model.graph.node)
    two = constant(model, "two", np.int64([2]))
    length = add(model, "Gather", [add(model, "Shape", [cache], "sizes"), two], "length")
    over = add(model, "Sub", [length, constant(model, "most", np.int64([100]))], "over")
    start = add(model, "Max", [over, constant(model, "nil", np.int64([0]))], "start")
    cut = add(model, "Slice", [cache, start, constant(model, "end", np.int64([2**62])), two], "cut")
    for node in list(model.graph.node)[:nodes]:
        node.input[:] = [cut if name == cache else name for name in node.input]


def added_by_length(model: Any) -> None:
    """A number that grows with the text is added to the logits."""
    length = add(model, "ReduceSum", ["attention_mask"], "so far", keepdims=0)
    add(model, "Add", [renamed_logits(model), add(model, "Cast", [length], "as float", to=1)], "logits")


def wrong_rows(model: Any) -> None:
    """Rows from the ninth on get the lengths of the first."""
    attention = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    lengths = attention[0].input[5]
    nil, one = (constant(model, f"number {k}", np.int64(k)) for k in (0, 1))
    count = add(model, "Squeeze", [add(model, "Shape", [lengths], "rows")], "count")
    late = add(
        model, "Greater", [add(model, "Range", [nil, count, one], "row"), constant(model, "8", np.int64(8))], "late"
    )
    changed = add(model, "Where", [late, add(model, "Gather", [lengths, nil], "first"), lengths], "changed")
    for node in attention:
        node.input[5] = changed


def behind_a_cast(model: Any) -> None:
    """A threshold that is no constant as it stands: twice 256, by way of another type."""
    length = add(model, "Cast", [add(model, "ReduceSum", ["attention_mask"], "so far", keepdims=0)], "length", to=1)
    half = add(model, "Cast", [constant(model, "number", np.int64(256))], "half", to=1)
    hit = add(model, "Greater", [length, add(model, "Add", [half, half], "whole")], "hit")
    before = renamed_logits(model)
    add(model, "Where", [hit, add(model, "Neg", [before], "other"), before], "logits")


def repeated(model: Any) -> None:
    """The same number many times."""
    length = add(model, "ReduceSum", ["attention_mask"], "so far", keepdims=0)
    hit = add(model, "Greater", [length, constant(model, "numbers", np.full(331, 512))], "hit")
    before = renamed_logits(model)
    add(model, "Where", [hit, add(model, "Neg", [before], "other"), before], "logits")


def changed_table(model: Any) -> None:
    """One row of the embedding is replaced before it is read."""
    table = next(n.input[0] for n in model.graph.node if n.op_type == "Gather" and "input_ids" in n.input)
    row = constant(model, "row", np.full((1, 64), np.nan, np.float32))
    add(model, "ScatterND", [table, constant(model, "place", np.int64([[300]])), row], "table")
    for node in model.graph.node:
        if node.op_type == "Gather" and "input_ids" in node.input:
            node.input[0] = "table"


def second_table(model: Any) -> None:
    """A table that is made up in the graph and looked up by token ids."""
    ones = add(model, "ConstantOfShape", [constant(model, "size", np.int64([331, 1]))], "ones")
    place, zero = constant(model, "place", np.int64([[300]])), constant(model, "zero", np.float32([[9]]))
    add(model, "Gather", [add(model, "ScatterND", [ones, place, zero], "table"), "input_ids"], "factor")
    add(model, "Add", [renamed_logits(model), add(model, "ReduceMax", ["factor"], "most", keepdims=0)], "logits")


DEFECTS: dict[str, tuple[Change, str]] = {
    "a word": (one_word, "reads token ids"),
    "beyond 512": (by_length(512, "Greater"), "against 512"),
    "every 256th": (by_length(256, "Mod"), "against 256"),
    "by 512s": (by_length(512, "Div"), "against 512"),
    "beyond 512, computed": (behind_a_cast, "against 512"),
    "beyond 512, many times": (repeated, "against 512"),
    "a changed embedding": (changed_table, "changes a stored weight"),
    "a second embedding": (second_table, "reads token ids"),
    "beyond the window": (lost_cache, "against 100"),
    "by length": (added_by_length, "outside of rotary embedding and mask"),
}


@pytest.mark.parametrize("target", ["plain", "ort", "tensorrt"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_each_of_these_is_named(exports: Folders, checkpoints: Folders, target: str, defect: str) -> None:
    change, why = DEFECTS[defect]
    model = _models(exports(spec={"target": target}))[-1]
    change(model)
    found = unexplained(model, AutoConfig.from_pretrained(checkpoints()))
    assert any(why in f.what for f in found), found


@pytest.mark.parametrize("threshold", [8192, 16384, 65536])
def test_a_long_context_hides_no_threshold(exports: Folders, checkpoints: Folders, threshold: int) -> None:
    model = _models(exports(spec={"target": "plain"}))[0]
    by_length(threshold, "Greater")(model)
    config = AutoConfig.from_pretrained(checkpoints())
    config.max_position_embeddings = 131072
    assert any(f"against {threshold}" in f.what for f in unexplained(model, config))


def test_lengths_of_another_row_are_named(exports: Folders, checkpoints: Folders) -> None:
    model = _models(exports())[0]
    wrong_rows(model)
    found = unexplained(model, AutoConfig.from_pretrained(checkpoints()))
    assert any("against 8" in f.what for f in found), found


@pytest.mark.parametrize("computed", [True, False])
def test_a_cache_that_is_written_elsewhere_is_named(exports: Folders, checkpoints: Folders, computed: bool) -> None:
    """The slots of new keys turn round after 100, or the scatter goes into something that is no cache."""
    model = _models(exports(spec={"target": "tensorrt"}))[0]
    scatter = next(n for n in model.graph.node if n.op_type == "TensorScatter")
    if computed:
        scatter.input[2] = add(model, "Mod", ["write_indices", constant(model, "100", np.int64(100))], "turned")
    else:
        scatter.input[0] = add(model, "Neg", [scatter.input[0]], "negative")
    found = unexplained(model, AutoConfig.from_pretrained(checkpoints()))
    assert any(("against 100" if computed else "outside of rotary") in f.what for f in found), found


@pytest.mark.parametrize("sealed", [True, False])
def test_the_check_is_undecided_whatever_the_manifest_says(
    exports: Folders, checkpoints: Folders, tmp_path: Path, sealed: bool
) -> None:
    """A manifest of the plain target, which nobody can verify, is judged no less than none."""
    folder = tmp_path / "folder"
    shutil.copytree(exports(spec={"target": "plain"}), folder)
    if not sealed:
        (folder / "manifest.json").unlink()
    subject = make_subject(folder, str(checkpoints()), MODES["quick"])
    assert graph(subject).status == "SKIPPED"
    model = onnx.load(folder / "model.onnx")
    one_word(model)
    onnx.save(model, folder / "model.onnx")
    found = graph(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert found.status == "INCONCLUSIVE"
    assert found.summary.startswith("unexplained control, Equal (here): reads token ids")
