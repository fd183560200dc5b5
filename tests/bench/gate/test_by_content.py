"""The weight audit of third-party exports: right folders of many makers pass, each damaged tensor is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from bench.gate.checks.weights import weights
from bench.gate.found import Found
from bench.gate.modes import MODES
from bench.gate.validate import make_subject
from export.pipeline import export_model
from export.spec import ExportSpec

Folders = Callable[..., Path]
Change = Callable[[Any], None]
TIED = {"tie_word_embeddings": True}


@pytest.fixture
def audit(exports: Folders, checkpoints: Folders, tmp_path: Path) -> Callable[..., Found]:
    """``audit(change, precision, spec, **config)``: our export without its manifest, changed, by its weights."""

    def run(
        change: Change | None = None, precision: str = "fp32", spec: dict[str, Any] | None = None, **config: Any
    ) -> Found:
        folder = tmp_path / "folder"
        shutil.copytree(exports(precision, spec=spec, **config), folder)
        (folder / "manifest.json").unlink()
        for path in folder.glob("*.onnx") if change else ():
            model = onnx.load(path)
            change(model)
            onnx.save(model, path)
        return weights(make_subject(folder, str(checkpoints(**config)), MODES["quick"]))

    return run


@pytest.fixture(scope="module")
def plain(checkpoints: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A copy of optimum's own export, without a manifest."""
    made = tmp_path_factory.mktemp("plain") / "folder"
    export_model(ExportSpec(str(checkpoints()), target="plain"), made)
    (made / "manifest.json").unlink()

    def copy(target: Path) -> Path:
        shutil.copytree(made, target)
        return target

    return copy


def values(model: Any, name: str) -> NDArray[Any]:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def put(model: Any, name: str, array: NDArray[Any]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def edited(name: str, edit: Callable[[NDArray[Any]], None]) -> Change:
    def change(model: Any) -> None:
        array = values(model, name)
        edit(array)
        put(model, name, array)

    return change


def _nan_row(a: NDArray[Any]) -> None:
    a[77] = np.nan


def _swap_rows(a: NDArray[Any]) -> None:
    a[[40, 41, 42]] = a[[42, 40, 41]]


def _one_value(a: NDArray[Any]) -> None:
    a.flat[5] *= 1.001


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("config", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("edit", [_nan_row, _swap_rows, _one_value])
def test_a_damaged_embedding_is_named_however_good_the_head_is(audit: Any, edit: Any, config: dict[str, Any]) -> None:
    found = audit(edited(EMBEDDING, edit), **config)
    assert found.status == "FAIL"
    assert found.findings[0].where == EMBEDDING
    assert ("NaN" in found.findings[0].what) == (edit is _nan_row)


def test_a_damaged_norm_is_named(audit: Any) -> None:
    found = audit(edited("model.layers.1.input_layernorm.weight", _one_value))
    assert found.status == "FAIL"
    assert (found.findings[0].where, found.findings[0].layer) == ("model.layers.1.input_layernorm.weight", 1)


def test_a_large_tensor_that_the_checkpoint_lacks_is_named(audit: Any) -> None:
    """A vector added to the logits, all 0 but for one rare token."""

    def change(model: Any) -> None:
        last = next(n for n in model.graph.node if "logits" in n.output)
        last.output[list(last.output).index("logits")] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.eye(1, 331, 300, np.float32)[0] * 9, "extra"))
        model.graph.node.append(helper.make_node("Add", ["before", "extra"], ["logits"]))

    found = audit(change)
    assert (found.status, found.findings[0].where) == ("INCONCLUSIVE", "extra")


def test_the_right_tensor_beside_the_one_that_is_read_proves_nothing(audit: Any) -> None:
    def change(model: Any) -> None:
        good = values(model, EMBEDDING)
        bad = good.copy()
        bad[7] = 0
        put(model, EMBEDDING, bad)
        model.graph.initializer.append(numpy_helper.from_array(good, "unread"))

    assert audit(change).status == "FAIL"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_weight_stored_the_other_way_round_passes(audit: Any, precision: str) -> None:
    """``[outputs, inputs]`` with a Transpose in front of the product, joined or not."""

    def change(model: Any) -> None:
        for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
            name = node.input[1]
            put(model, name, np.ascontiguousarray(values(model, name).T))
            node.input[1] = f"{name}.turned"
            k = list(model.graph.node).index(node)
            model.graph.node.insert(k, helper.make_node("Transpose", [name], [node.input[1]], perm=[1, 0]))

    found = audit(change, precision)
    assert (found.status, "6 joined" in found.summary) == ("PASS", True)


@pytest.mark.parametrize(
    ("precision", "method"), [("int4", "rtn"), ("int4", "hqq"), ("int4", "kquant"), ("int4", "gptq"), ("int8", "rtn")]
)
def test_our_quantised_folders_pass_without_their_manifest(audit: Any, precision: str, method: str) -> None:
    found = audit(None, precision, {"method": method, "keep_float": "none"})
    assert found.status == "PASS", found.summary
    assert "quantised" in found.summary


def test_codes_that_stand_for_another_row_are_named(audit: Any) -> None:
    """A zeroed row of any matrix, by whatever method; a row of the head is one token's."""
    name = "model.layers.1.self_attn.o_proj.weight.codes"

    def empty(a: NDArray[Any]) -> None:
        a[9] = 0x88

    found = audit(edited(name, empty), "int4", {"method": "rtn", "keep_float": "none", "zero_points": "none"})
    assert found.status == "FAIL"
    assert found.findings[0].where == "model.layers.1.self_attn.o_proj.weight"
    assert "row 9" in found.findings[0].what


def test_scales_of_each_graph_are_read(audit: Any) -> None:
    """Two graphs over the same codes, of which one has other scales."""
    name = "model.layers.0.mlp.down_proj.weight.scales"
    seen = []

    def second(model: Any) -> None:
        seen.append(model)
        if len(seen) == 2:
            put(model, name, values(model, name) * np.float32(1.4))

    found = audit(second, "int4", {"method": "rtn", "keep_float": "none"})
    assert len(seen) == 2
    assert (found.status, found.findings[0].where) == ("FAIL", "model.layers.0.mlp.down_proj.weight")


def _untrained(checkpoint: Path, target: Path) -> Path:
    """A checkpoint with a token that was never trained, and numbers below the smallest of fp16."""
    shutil.copytree(checkpoint, target)
    tensors = load_file(target / "model.safetensors")
    for name in (EMBEDDING, "lm_head.weight"):
        tensors[name][17] *= 1e-22
    tensors["model.layers.0.self_attn.o_proj.weight"].flatten()[:4] = 2e-8
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("sealed", [True, False])
def test_a_row_that_is_as_good_as_nothing_may_be_one_value(checkpoints: Folders, tmp_path: Path, sealed: bool) -> None:
    checkpoint = _untrained(checkpoints(), tmp_path / "checkpoint")
    spec = ExportSpec(str(checkpoint), "int4", method="rtn", keep_float="none", activations="fp16")
    export_model(spec, tmp_path / "folder")
    if not sealed:
        (tmp_path / "folder" / "manifest.json").unlink()
    found = weights(make_subject(tmp_path / "folder", str(checkpoint), MODES["quick"]))
    assert found.status == "PASS", found.summary


def test_numbers_below_the_smallest_of_fp16_may_be_raised_to_it(checkpoints: Folders, tmp_path: Path) -> None:
    """As onnxruntime's converter does."""
    checkpoint = _untrained(checkpoints(), tmp_path / "checkpoint")
    folder = tmp_path / "folder"
    export_model(ExportSpec(str(checkpoint), "fp16"), folder)
    (folder / "manifest.json").unlink()
    for path in folder.glob("*.onnx"):
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float16 and array.ndim == 2:
                put(model, tensor.name, np.where(array == 0, np.float16(2.0**-24), array))
        onnx.save(model, path)
    found = weights(make_subject(folder, str(checkpoint), MODES["quick"]))
    assert found.status == "PASS", found.summary


def test_buffers_beside_the_weights_are_none(decoders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, folder = decoders("gpt2")
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = load_file(copy / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 160, 160).tril()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert weights(make_subject(folder, str(copy), MODES["quick"])).status == "PASS"


def _quantised_matrix(model: Any) -> None:
    """One matrix in int8, by a DequantizeLinear in front of its product."""
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    name = node.input[1]
    weight = values(model, name)
    scale = np.float32(np.abs(weight).max() / 127)
    put(model, name, np.round(weight / scale).astype(np.int8))
    model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    node.input[1] = "dequantised"
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", [name, "scale"], ["dequantised"]))


def test_one_quantised_matrix_makes_no_folder_int8(audit: Any, checkpoints: Folders, tmp_path: Path) -> None:
    found = audit(_quantised_matrix)
    subject = make_subject(tmp_path / "folder", str(checkpoints()), MODES["quick"])
    assert subject.manifest.precision == "fp32"
    assert found.status == "FAIL"
    assert "quantised to 8 bits, the folder's weights are fp32" in found.findings[0].what


def _of_onnxruntime(folder: Path, how: str) -> None:
    """What onnxruntime's own quantisers make of a folder, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind, per_channel = (QuantType.QInt8, False) if how == "one scale" else (QuantType.QUInt8, True)
    path = folder / "model.onnx"
    quantize_dynamic(str(path), str(folder / "new.onnx"), weight_type=kind, per_channel=per_channel)
    (folder / "new.onnx").replace(path)


@pytest.mark.parametrize("how", ["one scale", "a scale for each output"])
def test_dynamically_quantised_folders_pass_and_their_damage_does_not(
    how: str, plain: Any, checkpoints: Folders, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "folder")
    _of_onnxruntime(folder, how)
    found = weights(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert found.status == "PASS", found.summary
    assert "16 quantised" in found.summary
    model = onnx.load(folder / "model.onnx")
    name = next(t.name for t in model.graph.initializer if t.name.endswith("_quantized") and "MatMul" in t.name)
    codes = values(model, name)
    codes[:, 3] = 128 if how != "one scale" else 0
    put(model, name, codes)
    onnx.save(model, folder / "model.onnx")
    found = weights(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert found.status == "FAIL"
    assert "row 3" in found.findings[0].what


def test_blocks_of_four_bits_before_a_product_are_read(plain: Any, checkpoints: Folders, tmp_path: Path) -> None:
    """``DequantizeLinear`` of int4 codes with a scale for each 32 inputs, as TensorRT takes it."""
    folder = plain(tmp_path / "folder")
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 21
    for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
        tensor = next((t for t in model.graph.initializer if t.name == node.input[1]), None)
        if tensor is None:
            continue
        weight = numpy_helper.to_array(tensor)
        blocks = weight.reshape(len(weight) // 32, 32, -1)
        scales = (np.abs(blocks).max(axis=1) / 7).astype(np.float32)
        codes = np.round(blocks / scales[:, None]).reshape(weight.shape).astype(np.int8)
        nibbles = (codes.ravel()[0::2] & 15) | ((codes.ravel()[1::2] & 15) << 4)
        name = tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.raw_data = name, 22, nibbles.astype(np.uint8).tobytes()
        tensor.dims[:] = codes.shape
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{name}.s"))
        node.input[1] = f"{name}.d"
        k = list(model.graph.node).index(node)
        new = helper.make_node("DequantizeLinear", [name, f"{name}.s"], [f"{name}.d"], axis=0, block_size=32)
        model.graph.node.insert(k, new)
    onnx.save(model, folder / "model.onnx")
    subject = make_subject(folder, str(checkpoints()), MODES["quick"])
    assert subject.manifest.precision == "int4"
    found = weights(subject)
    assert found.status == "PASS", found.summary
    assert "15 quantised" in found.summary


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "qwen2"])
def test_other_architectures_pass(name: str, decoders: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, folder = decoders(name)
    found = weights(make_subject(folder, str(checkpoint), MODES["quick"]))
    assert found.status == "PASS", found.summary


def test_a_changed_mask_of_a_local_attention_is_named(
    decoders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, good = decoders("gpt_neo")
    folder = tmp_path / "folder"
    shutil.copytree(good, folder)
    model = onnx.load(folder / "model.onnx")
    mask = next(
        n for n in model.graph.node if n.op_type == "Constant" and list(n.attribute[0].t.dims)[2:] == [160, 160]
    )
    array = numpy_helper.to_array(mask.attribute[0].t).copy()
    array[..., 100:, :50] = False
    mask.attribute[0].t.CopyFrom(numpy_helper.from_array(array))
    onnx.save(model, folder / "model.onnx")
    found = weights(make_subject(folder, str(checkpoint), MODES["quick"]))
    assert (found.status, "causal mask" in found.summary) == ("INCONCLUSIVE", True)
