"""TensorRT-RTX's own compiler over the family: caches in place, attentions whole, and every refusal names its node."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export.manifest import DECODE_GRAPH
from runtime.errors import CompilerMissingError, SessionError
from runtime.loading import read_folder
from runtime.tensorrt import Shapes, engine_profiles
from runtime.trt_compiler import Compiled, compile_graph, engine_file, parse_sms, version

Exports = Callable[..., Path]
TARGET = {"target": "tensorrt"}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 80,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80}},
}
pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


def compiled(folder: Path, sms: tuple[int, ...] = (89,), out: Path | None = None) -> Compiled:
    manifest = read_folder(folder, verify=False)
    profiles = engine_profiles(manifest, Shapes((1, 1, 4), (1, 16, 40), 20))
    return compile_graph(folder / manifest.decode_graph, list(profiles.values()), sms, out)


def as_intended(found: Compiled, layers: int = 2) -> None:
    kinds = found.kinds()
    wanted = {"KV_CACHE_UPDATE": 2 * layers, "ATTENTION_INPUT": layers, "ATTENTION_OUTPUT": layers, "SOFTMAX": 0}
    assert {kind: kinds.get(kind, 0) for kind in wanted} == wanted
    assert kinds["ROTARY_EMBEDDING"] == 2 * layers
    assert (found.faults, found.warnings) == ((), ())
    assert [e.faults for e in found.engines] == [()]


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_scaling_compiles(rope: str, exports: Exports) -> None:
    as_intended(compiled(exports("fp16", TARGET, **HEADS, **ROPES[rope])))


@pytest.mark.parametrize(
    ("head_dim", "group", "precision"), [(64, 1, "bf16"), (80, 4, "fp16"), (80, 1, "bf16"), (128, 8, "fp16")]
)
def test_heads_and_groups(head_dim: int, group: int, precision: str, exports: Exports) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8 // group, "head_dim": head_dim}
    as_intended(compiled(exports(precision, TARGET, **heads)))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_heads_and_groups(head_dim: int, group: int, precision: str, exports: Exports) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8 // group, "head_dim": head_dim}
    as_intended(compiled(exports(precision, TARGET, **heads)))


QUANTISED = {**TARGET, "activations": "fp16", "keep_float": "none"}


@pytest.mark.parametrize(("precision", "head"), [("int8", 0), ("int4", 1)])
def test_quantised_weights_stay_quantised(precision: str, head: int, exports: Exports) -> None:
    found = compiled(exports(precision, QUANTISED, **HEADS))
    as_intended(found)
    assert found.kinds()["DEQUANTIZE"] == 5 * 2 + head  # qkv, o, gate, up, down


def test_int4_does_not_compile_for_turing(exports: Exports) -> None:
    (engine,) = compiled(exports("int4", QUANTISED, **HEADS), (75,)).engines
    assert [(f.where, "sm75" in f.what and "int4" in f.what) for f in engine.faults] == [("SM 75", True)]


def test_engines_are_written_and_hashed(exports: Exports, tmp_path: Path) -> None:
    folder = exports("fp16", TARGET, **HEADS)
    found = compiled(folder, (89, 120), tmp_path)
    weights = sum(w.nbytes for w in read_folder(folder, verify=False).weights)
    assert [e.sm for e in found.engines] == [89, 120]
    for engine in found.engines:
        held = engine_file(tmp_path, engine.sm).read_bytes()
        assert (len(held), hashlib.sha256(held).hexdigest()) == (engine.nbytes, engine.sha256)
        assert engine.nbytes > weights


def softcap(model: Any) -> None:
    attention = [n for n in model.graph.node if n.op_type == "Attention"][1]
    attention.attribute.append(helper.make_attribute("softcap", 30.0))


def ignored_lengths(model: Any) -> None:
    attention = [n for n in model.graph.node if n.op_type == "Attention"][1]
    attention.input.extend([""] * (6 - len(attention.input)) + ["write_indices"])


def decomposable(model: Any) -> None:
    attention = [n for n in model.graph.node if n.op_type == "Attention"][1]
    attention.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def unknown_operator(model: Any) -> None:
    model.graph.node.append(helper.make_node("BitwiseAnd", ["input_ids"] * 2, ["bits"], name="/model/layers.1/Bits"))
    model.graph.output.append(helper.make_tensor_value_info("bits", TensorProto.INT64, None))


def cache_that_grows(model: Any) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.endswith(".1.key"):
            value.type.tensor_type.shape.dim[2].dim_param = "cache"


REFUSED: dict[Callable[[Any], None], tuple[str, str]] = {
    softcap: ("layers.1", "Setting softcap is not supported"),
    ignored_lengths: ("layers.1", "TensorRT ignores nonpad_kv_seqlen of Attention"),
    decomposable: ("layers.1", "lets TensorRT pull Attention apart"),
    unknown_operator: ("/model/layers.1/Bits", "operator BitwiseAnd is not supported"),
    cache_that_grows: ("layers.1", "must have a static sequence length"),
}


@pytest.mark.parametrize("defect", REFUSED)
def test_a_refusal_names_the_node(defect: Callable[[Any], None], exports: Exports, tmp_path: Path) -> None:
    folder = exports("fp16", TARGET, **HEADS)
    model = onnx.load(folder / DECODE_GRAPH, load_external_data=False)
    defect(model)
    manifest = read_folder(folder, verify=False)
    (tmp_path / manifest.data_file).symlink_to(folder / manifest.data_file)
    onnx.save(model, tmp_path / DECODE_GRAPH)
    found = compile_graph(tmp_path / DECODE_GRAPH, [], (89,))
    where, what = REFUSED[defect]
    assert len(found.faults) == 1
    assert where in found.faults[0].where
    assert what in found.faults[0].what
    assert "cuda" not in found.faults[0].what.lower()
    assert found.engines == ()


def test_an_input_that_nobody_reads(exports: Exports, tmp_path: Path) -> None:
    folder = exports("fp16", TARGET, **HEADS)
    model = onnx.load(folder / DECODE_GRAPH, load_external_data=False)
    model.graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]))
    manifest = read_folder(folder, verify=False)
    (tmp_path / manifest.data_file).symlink_to(folder / manifest.data_file)
    onnx.save(model, tmp_path / DECODE_GRAPH)
    profiles = engine_profiles(manifest, Shapes((1, 1, 4), (1, 16, 40), 20))
    asked = [{**ranges, "lengths": ([1], [1], [4])} for ranges in profiles.values()]
    (engine,) = compile_graph(tmp_path / DECODE_GRAPH, asked, (89,)).engines
    assert [(f.where, f.what) for f in engine.faults] == [("lengths", "is an input that TensorRT never reads")]


def test_fp32_has_no_engine_for_a_prompt(exports: Exports) -> None:
    (engine,) = compiled(exports("fp32", TARGET, **HEADS)).engines
    assert engine.faults[0].where == "SM 89"
    assert engine.faults[0].what.startswith("no engine: Attention operation was not supported by a dedicated kernel")


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"garbage" * 10)
    (fault,) = compile_graph(tmp_path / "bad.onnx").faults
    assert (fault.where, "Failed to parse" in fault.what) == ("graph", True)


def test_gpus_by_number() -> None:
    assert parse_sms("89, sm120,8.6,89") == (89, 120, 86)
    for bad in ("", "90", "89,x", "all"):
        with pytest.raises(SessionError, match="75, 80, 86, 89, 120, 121"):
            parse_sms(bad)


def test_without_the_extra_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CompilerMissingError, match=r"not installed: pip install 'llama-onnx-bench\[tensorrt-rtx\]'"):
        version()
