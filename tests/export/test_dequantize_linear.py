"""int8 and int4 with standard operators: ``DequantizeLinear`` and ``MatMul``, read by ONNX's own code and run against
PyTorch on the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from export.check import check_graph
from export.convert import convert
from export.errors import ExportError, GraphCheckError, UnsupportedModelError
from export.manifest import Weight, read_manifest
from export.pipeline import export_model, load_config
from export.quantize import Packed, dequantize, quantize
from export.source import resolve
from export.spec import ExportSpec
from export.tensorrt_ops import check_standard
from export.weights import _turned_codes
from runtime.loading import load
from runtime.probe import GraphProbe
from runtime.torch_session import TorchSession
from tests.export.test_precisions import distances, packed_weights, replaced

Folders = Callable[..., Path]
BITS = {"int8": 8, "int4": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def standard(method: str = "rtn", **fields: Any) -> dict[str, Any]:
    """Fields of an ExportSpec that keep nothing in floats and compute in floats."""
    own = {"target": "tensorrt", "activations": "fp32", "method": method, "keep_float": "none", "accuracy_level": 0}
    return {**own, **fields}


def values_on_disk(folder: Path, product: str, block: int) -> Tensor:
    """What a product's codes and scales stand for, [rows, columns], read by the onnx package."""
    model = onnx.load(folder / "model.onnx")
    tensors = {t.name: t for t in model.graph.initializer}
    codes, scales = (numpy_helper.to_array(tensors[f"{product}.weight.{p}"]) for p in ("codes", "scales"))
    codes, scales = codes.astype(np.float32), scales.astype(np.float32)
    assert (scales > 0).all()  # TensorRT's parser refuses others
    return torch.from_numpy((codes * scales.repeat(block, axis=0)[: len(codes)]).T.copy())


@pytest.mark.parametrize("method", ["rtn", "hqq", "kquant", "gptq"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_graph_is_the_dequantised_model(
    precision: str, method: str, checkpoints: Folders, exports: Folders, calibration: Sequence[str], tmp_path: Path
) -> None:
    fields = standard(method, lm_head=precision)  # 331 outputs: codes of two rows of the tensor share a byte
    spec = ExportSpec(str(checkpoints()), precision, **fields)
    folder = exports(precision, spec=fields)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    packed = packed_weights(checkpoints(), spec, calibration)
    for product, (_, bits, want) in packed.items():
        columns = 96 if "down" in product else 64
        have = values_on_disk(folder, product, spec.block)
        torch.testing.assert_close(have, dequantize(want, bits, spec.block, columns), rtol=0, atol=0)
    manifest = read_manifest(folder)
    assert manifest.fused_ops["DequantizeLinear"] == manifest.fused_ops["MatMul"] == 11
    kinds = {w.transform: w.dtype for w in manifest.weights if w.bits}
    assert kinds == {"codes_transposed": precision, "scales_transposed": "fp32"}
    codes = next(w for w in manifest.weights if w.name == "model.layers.0.mlp.up_proj.weight.codes")
    assert (codes.shape, codes.nbytes) == ((64, 96), 64 * 96 * BITS[precision] // 8)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("columns", [16, 33, 87])
@pytest.mark.parametrize("piece", [1, 1 << 21])
def test_pieces_of_codes_are_the_onnx_package_s_bytes(
    rows: int, columns: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, and pieces of 16 columns: ``columns x rows`` may be odd, then half of the last byte is empty."""
    monkeypatch.setattr("export.weights._PIECE", piece)
    torch.manual_seed(rows * columns)
    for bits, kind in ((4, TensorProto.INT4), (8, TensorProto.INT8)):
        packed = quantize(torch.randn(rows, columns), bits, 16, "rtn", symmetric=True, positive=True)
        recipe = Weight("w", (), "codes_transposed", (columns, rows), f"int{bits}", 0, 0, bits)
        made = b"".join(p.contiguous().numpy().tobytes() for p in _turned_codes(recipe, packed))
        levels = dequantize(Packed(packed.codes, torch.ones_like(packed.scales), None), bits, 16, columns)
        wanted = onnx.helper.make_tensor("w", kind, [columns, rows], levels.T.flatten().to(int).tolist())
        stored = onnx.TensorProto(name="w", data_type=kind, dims=[columns, rows], raw_data=made)
        np.testing.assert_array_equal(numpy_helper.to_array(stored), numpy_helper.to_array(wanted))
        assert len(made) == -(-rows * columns * bits // 8)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_follows_its_own_policy(tied: bool, checkpoints: Folders, exports: Folders, tmp_path: Path) -> None:
    fields, changes = standard(lm_head="int8"), {"tie_word_embeddings": tied}
    source, folder = checkpoints(**changes), exports("int4", spec=fields, **changes)
    spec = ExportSpec(str(source), "int4", **fields)
    packed = packed_weights(source, spec, (), tied=tied)
    have = {w.name: w for w in read_manifest(folder).weights}
    assert (have["lm_head.weight.codes"].dtype, have["model.embed_tokens.weight"].dtype) == ("int8", "fp32")
    oracle = replaced(source, tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5


def products_that_ran(folder: Path, prefix: Path, **more: Any) -> tuple[set[str], Any]:
    """Types of the nodes that computed with codes in a decode step, by ONNX Runtime's own profile; and logits."""
    with load(folder, threads=1, profile=prefix, **more) as session:
        session.prefill([[5, 6, 7]], 2)
        logits = session.step([8]).copy()
        events = json.loads(session.end_profile().read_text())
    ran = {(e["args"]["op_name"], e["name"]) for e in events if e.get("args", {}).get("op_name")}
    kinds = [op for op, _ in ran if op in ("MatMulNBits", "DequantizeLinear", "MatMul")]
    return {f"{kinds.count(op)} {op}" for op in set(kinds)}, logits


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_makes_every_one_of_them_matmulnbits(
    precision: str, activations: str, exports: Folders, tmp_path: Path
) -> None:
    """One that is left would be expanded at each step: slow, and in another arithmetic."""
    fields = standard(lm_head=precision, activations=activations, accuracy_level=4)
    folder = exports(precision, spec=fields)
    ran, quick = products_that_ran(folder, tmp_path / "four")
    assert ran == {"11 MatMulNBits"}
    # The manifest's level is what runs, unless the user asks for another.
    key = "session.qdq_matmulnbits_accuracy_level"
    ran, exact = products_that_ran(folder, tmp_path / "zero", session_options={key: "0"})
    assert ran == {"11 MatMulNBits"}
    exports_at_0 = exports(precision, spec={**fields, "accuracy_level": 0})
    _, wanted = products_that_ran(exports_at_0, tmp_path / "own")
    np.testing.assert_array_equal(exact, wanted)
    assert 1e-4 < np.abs(quick - exact).max() / np.abs(exact).max() < 0.1


def test_a_probe_computes_at_the_manifests_level(exports: Folders) -> None:
    """It is what localisation compares with PyTorch: at another level it would point at another layer."""
    folder = exports("int4", spec=standard(lm_head="int4", accuracy_level=0))
    manifest = read_manifest(folder)
    with load(folder, threads=1) as session:
        wanted = session.score([5, 6, 7]).copy()
    probe = GraphProbe(folder / manifest.scoring_graph, manifest, 1)
    np.testing.assert_allclose(probe.run([5, 6, 7])["logits"][0], wanted, rtol=1e-5, atol=1e-6)
    probe.close()


def test_fp16_stays_near(checkpoints: Folders, exports: Folders, tmp_path: Path) -> None:
    """The default activations of this target; scales are rounded to fp16 before codes are chosen."""
    fields = {"target": "tensorrt", "method": "rtn", "accuracy_level": 0}
    folder = exports("int4", spec=fields)
    manifest = read_manifest(folder)
    assert (manifest.activations, manifest.kv.dtype) == ("fp16", "fp16")
    spec = ExportSpec(str(checkpoints()), "int4", **fields)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed_weights(checkpoints(), spec, ()), spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert 1e-6 < max(distances(ours, theirs)) < 1e-2


def test_cuda_in_fp32_gets_the_same_form(exports: Folders) -> None:
    folder = exports("int4", spec={"provider": "cuda", "method": "rtn"})
    assert read_manifest(folder).fused_ops["DequantizeLinear"] == 11


@pytest.mark.parametrize(
    ("precision", "fields", "named"),
    [
        ("int4", {"target": "tensorrt", "zero_points": "integer"}, "--zero-points none"),
        ("int4", {"target": "tensorrt", "zero_points": "float"}, "--zero-points none"),
        ("int8", {"provider": "cuda", "zero_points": "integer"}, "--zero-points none"),
        ("int8", {"target": "tensorrt", "embedding": "int8"}, "--embedding float"),
        ("int8", {"target": "plain"}, "'ort' and 'tensorrt'"),
    ],
)
def test_what_tensorrt_lacks_is_refused(precision: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ExportError, match=named):
        ExportSpec("demo", precision, **fields)


def test_part_of_a_block_is_refused(checkpoints: Folders, tmp_path: Path) -> None:
    """TensorRT's parser refuses 88 inputs with 3 scales, but would take 496 with 16, though blocks of 32 are 15.5."""
    with pytest.raises(UnsupportedModelError, match=r"--block-size 32 does not divide the 88 inputs of .*down_proj"):
        export_model(ExportSpec(str(checkpoints(intermediate_size=88)), "int4", target="tensorrt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    spec = ExportSpec(str(checkpoints(intermediate_size=88)), "int4", target="tensorrt", keep_float="down")
    assert export_model(spec, tmp_path / "out")[0].fused_ops["DequantizeLinear"] == 9


def _with_zero_point(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    node.input.append("model.layers.0.self_attn.qkv_proj.weight.codes")


def _of_unsigned(model: onnx.ModelProto) -> None:
    next(t for t in model.graph.initializer if t.name.endswith(".codes")).data_type = TensorProto.UINT4


def _part_of_a_block(model: onnx.ModelProto) -> None:
    next(t for t in model.graph.initializer if t.name.endswith(".codes")).dims[0] -= 2


def _one_scale(model: onnx.ModelProto) -> None:
    scales = next(t for t in model.graph.initializer if t.name.endswith(".scales"))
    del scales.dims[:]


def _computed_scale(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "DequantizeLinear").input[1] = "attention_mask"


def _one_float(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    model.graph.node.remove(node)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_with_zero_point, "may not have a zero point"),
        (_of_unsigned, "UINT4"),
        (_computed_scale, "must be a constant"),
        (_part_of_a_block, "whole blocks"),
        (_one_scale, "whole blocks"),
        (_one_float, "10 DequantizeLinear where the config demands 11"),
    ],
)
def test_what_is_not_that_form_is_found(
    spoil: Callable[[onnx.ModelProto], None], named: str, checkpoints: Folders
) -> None:
    config = load_config(resolve(str(checkpoints())))
    spec = ExportSpec(str(checkpoints()), "int4", target="tensorrt")
    model = convert(config, spec, "data").decode
    assert check_standard(model) == []
    assert check_graph(model, config, spec)["DequantizeLinear"] == 11
    spoil(model)
    with pytest.raises(GraphCheckError, match=named):
        check_graph(model, config, spec)
