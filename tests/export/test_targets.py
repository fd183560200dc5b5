"""Target ``tensorrt`` (standard operators) and ``plain`` (optimum's graph of any decoder)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.errors import ExportError, UnsupportedModelError
from export.manifest import read_manifest
from export.pipeline import export_model
from export.spec import ExportSpec
from export.tensorrt_ops import check_standard
from runtime.loading import load
from runtime.torch_session import TorchSession

Folders = Callable[..., Path]
TENSORRT = {"target": "tensorrt"}


def _run(folder: Path, ids: Any, mask: Any, positions: Any) -> Any:
    manifest = read_manifest(folder)
    session = ort.InferenceSession(folder / manifest.scoring_graph, providers=["CPUExecutionProvider"])
    kv = manifest.kv
    past = np.zeros((len(ids), kv.kv_heads, kv.cache_length, kv.head_dim), np.float32)
    feed = {name: past for name in manifest.inputs if name.startswith("past")}
    wide = np.pad(mask, ((0, 0), (0, kv.cache_length - mask.shape[1])))
    feed |= {"input_ids": ids, "attention_mask": wide, "position_ids": positions}
    feed["write_indices"] = np.zeros(len(ids), np.int64)
    return session.run(["logits"], feed)[0]


def test_left_and_right_padded_batches_give_what_each_row_gives_alone(exports: Folders, checkpoints: Folders) -> None:
    folder = exports(spec=TENSORRT)
    rows = [np.random.default_rng(k).integers(3, 331, n) for k, n in enumerate((23, 4, 11))]
    width = 23
    with TorchSession(checkpoints(), attention="eager", threads=1) as theirs:
        alone = [theirs.score(r.tolist()).copy() for r in rows]
    for left in (False, True):
        ids, mask, positions = (np.zeros((3, width), np.int64) for _ in range(3))
        for k, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[k, place], mask[k, place], positions[k, place] = row, 1, np.arange(len(row))
        logits = _run(folder, ids, mask, positions)
        assert np.isfinite(logits).all()  # rows that may see nothing included
        for k, row in enumerate(rows):
            own = logits[k, -len(row) :] if left else logits[k, : len(row)]
            np.testing.assert_allclose(own, alone[k], atol=3e-5 * np.abs(alone[k]).max())


def test_the_tensorrt_graph_is_standard_and_says_so(exports: Folders) -> None:
    folder = exports(spec=TENSORRT)
    manifest = read_manifest(folder)
    model = onnx.load(folder / manifest.decode_graph)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert manifest.attention == "Attention"
    assert manifest.kv.shared_buffer
    assert manifest.kv.cache_length == manifest.context_length
    assert any("10.15" in note for note in manifest.notes)
    assert check_standard(model) == []


def _spoil(model: onnx.ModelProto, how: str) -> None:
    graph = model.graph
    attention = next(n for n in graph.node if n.op_type == "Attention")
    if how == "past input":
        attention.input.extend(["past_key_values.0.key", "past_key_values.0.value"])
    elif how == "nonpad_kv_seqlen":
        attention.input.extend(["", "", "write_indices"])
    elif how == "causal as well":
        attention.attribute.append(helper.make_attribute("is_causal", 1))
    elif how == "softcap":
        attention.attribute.append(helper.make_attribute("softcap", 30.0))
    elif how == "dynamic cache":
        cache = next(i for i in graph.input if i.name == "past_key_values.1.key")
        cache.type.tensor_type.shape.dim[2].dim_param = "total"
    elif how in ("computed cache", "circular"):
        scatter = next(n for n in graph.node if n.op_type == "TensorScatter")
        if how == "circular":
            scatter.attribute.append(helper.make_attribute("mode", "circular"))
        else:
            scatter.input[0] = scatter.input[1]
    elif how == "second output":
        attention.output.append("extra")
    elif how == "contrib operator":
        attention.domain = "com.microsoft"
    elif how == "unknown operator":
        attention.op_type = "NonMaxSuppression"
    elif how == "opset":
        model.opset_import[0].version = 25
    elif how == "type":
        graph.initializer[0].data_type = TensorProto.DOUBLE
    elif how == "computed axes":
        node = next(n for n in graph.node if n.op_type == "Unsqueeze")
        node.input[1] = "input_ids"
    elif how == "subgraph":
        empty = helper.make_graph([], "empty", [], [])
        attention.attribute.append(helper.make_attribute("body", empty))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("past input", "past keys"),
        ("nonpad_kv_seqlen", "ignored without an error"),
        ("causal as well", "not both"),
        ("softcap", "softcap"),
        ("dynamic cache", "past_key_values.1.key has to be static"),
        ("computed cache", "from an input of the graph"),
        ("circular", "linear"),
        ("second output", "one output"),
        ("contrib operator", "com.microsoft::Attention"),
        ("unknown operator", "NonMaxSuppression"),
        ("opset", "25"),
        ("type", "DOUBLE"),
        ("computed axes", "constant"),
        ("subgraph", "subgraph"),
    ],
)
def test_what_the_parser_would_refuse_is_named(how: str, named: str, exports: Folders) -> None:
    model = onnx.load(exports(spec=TENSORRT) / "model.onnx", load_external_data=False)
    _spoil(model, how)
    assert any(named in text for text in check_standard(model))


def test_cuda_fp32_gets_standard_operators_and_the_manifest_says_so(exports: Folders) -> None:
    manifest = read_manifest(exports(spec={"provider": "cuda"}))
    assert (manifest.target, manifest.attention) == ("ort", "Attention")
    assert any("CUDA" in note for note in manifest.notes)
    assert read_manifest(exports("fp16", spec={"provider": "cuda"})).attention == "GroupQueryAttention"


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "qwen2"])
def test_plain_export_equals_pytorch(name: str, decoders: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, folder = decoders(name)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 331, n).tolist() for n in (97, 5, 41)]
    with load(folder, threads=1) as ours, TorchSession(checkpoint, attention="eager", threads=1) as theirs:
        for prompts in ([rows[0]], rows):
            pairs = [(ours.prefill(prompts, 32).copy(), theirs.prefill(prompts, 32))]
            for _ in range(32):
                token = rng.integers(0, 331, len(prompts)).tolist()
                pairs.append((ours.step(token).copy(), theirs.step(token).copy()))
            for a, b in pairs:
                np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        a, b = ours.score(rows[2]), theirs.score(rows[2])
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_plain_manifest_tells_the_truth(decoders: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, folder = decoders("gpt_neo")
    manifest = read_manifest(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert manifest.parameters == sum(p.numel() for p in model.parameters())
    assert (manifest.model_type, manifest.target, manifest.attention) == ("gpt_neo", "plain", "unfused")
    assert (manifest.kv.layers, manifest.kv.kv_heads, manifest.kv.head_dim) == (4, 4, 16)
    assert manifest.decode_graph == manifest.scoring_graph == "model.onnx"
    # Everything but the position table, of which a step reads one row; the tied embedding is the head.
    wanted = 4 * (manifest.parameters - 160 * 64)
    assert wanted <= manifest.decode_weight_bytes <= wanted * 1.1


def test_what_optimum_cannot_export_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import RwkvConfig, RwkvModel

    RwkvModel(RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedModelError, match="rwkv"):
        export_model(ExportSpec(str(tmp_path / "in"), target="plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gpt_neo_without_plain_is_told_about_it(decoders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--target plain"):
        export_model(ExportSpec(str(decoders("gpt_neo")[0])), tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "int8", "target": "plain"},
        {"precision": "fp32", "method": "hqq"},
        {"precision": "int4", "method": "awq"},
        {"precision": "int4", "block_size": 33},
        {"precision": "fp16", "activations": "fp32"},
        {"precision": "int4", "lm_head": "int2"},
        {"precision": "fp32", "embedding": "int8"},
        {"precision": "int3"},
        {"provider": "tpu"},
    ],
)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ExportError):
        ExportSpec("demo", **fields)


@pytest.mark.parametrize("nope", [8, 16])
def test_keys_and_values_of_two_sizes_are_refused(
    nope: int, tmp_path: Path, tokenizer_in: Callable[[Path], None]
) -> None:
    """DeepSeek-V3, whose keys have a rotated part beside the one that is as long as a value."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=160,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=nope,
        v_head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "deepseek")
    tokenizer_in(tmp_path / "deepseek")
    spec = ExportSpec(str(tmp_path / "deepseek"), target="plain")
    if nope + 8 == 16:  # of one size
        export_model(spec, tmp_path / "out")
        return
    with pytest.raises(UnsupportedModelError, match=r"'deepseek_v3': .* \[4, 16\], \[4, 24\]"):
        export_model(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
