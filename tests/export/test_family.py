"""LLaMA, Mistral, Qwen2 and Qwen3 on small random models, against the unpatched transformers model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.architectures import ARCHITECTURES, has_fused_export
from export.convert import convert
from export.errors import BrokenCheckpointError, ExportError, GraphCheckError, UnsupportedModelError
from export.manifest import read_manifest
from export.pipeline import export_model
from export.spec import ExportSpec
from runtime.errors import ContextOverflowError
from runtime.loading import load
from runtime.torch_session import TorchSession
from tests.conftest import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80}
WINDOWS = {"use_sliding_window": True, "sliding_window": 24}
FAMILY: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "multi-head": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head-dim-not-hidden-over-heads": {"head_dim": 32},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "both-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope-llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "rope-yarn": {"rope_scaling": YARN},
    "rope-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "eps-1e-5": {"rms_norm_eps": 1e-5},
    "eps-large": {"rms_norm_eps": 1e-2},
    "vocabulary-not-multiple-of-8": {"vocab_size": 1003},
    "sharded": {"shards": "60KB"},
    "one-layer": {"num_hidden_layers": 1},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 24},
    "mistral-window-of-two": {"model_type": "mistral", "sliding_window": 2},
    "mistral-window-above-the-prompt": {"model_type": "mistral", "sliding_window": 120, "head_dim": 32},
    "mistral-window-above-the-context": {"model_type": "mistral", "sliding_window": 160},
    "ministral": {
        **{"model_type": "ministral", "head_dim": 16, "sliding_window": 24},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied-yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_scaling": YARN},
    "qwen2-mixed-windows": {"model_type": "qwen2", **WINDOWS, "max_window_layers": 1},
    "qwen2-windows-off": {"model_type": "qwen2", "sliding_window": 24, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3-bias-yarn": {"model_type": "qwen3", "head_dim": 48, "attention_bias": True, "rope_scaling": YARN},
    "qwen3-windows-by-type": {
        **{"model_type": "qwen3", "head_dim": 32, **WINDOWS, "num_hidden_layers": 3},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
STEPS = 64


def close(ours: Any, theirs: Any) -> None:
    scale = np.abs(theirs).max()
    # Against the same model in float64 each side is up to 3e-6 off on these weights; an epsilon of 2e-6 for 1e-6
    # gives 1e-4.
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("name", FAMILY)
def test_prefill_and_decode_equal_pytorch(
    name: str, target: str, checkpoints: Callable[..., Path], exports: Callable[..., Path]
) -> None:
    changes = FAMILY[name]
    rng = np.random.default_rng(1)
    vocabulary = changes.get("vocab_size", 331)
    rows = [rng.integers(0, vocabulary, n).tolist() for n in (96, 5, 41)]
    folder = exports(spec={"target": target}, **changes)
    with load(folder, threads=1) as ours, TorchSession(checkpoints(**changes), attention="eager", threads=1) as theirs:
        for prompts in ([rows[0]], rows):
            close(ours.prefill(prompts, STEPS), theirs.prefill(prompts, STEPS))
            for _ in range(STEPS):
                token = rng.integers(0, vocabulary, len(prompts)).tolist()
                close(ours.step(token), theirs.step(token))
        close(ours.score(rows[0]), theirs.score(rows[0]))


def test_dynamic_rope_is_refused_beyond_its_original_context(exports: Callable[..., Path]) -> None:
    folder = exports(**FAMILY["rope-dynamic"])
    assert any("dynamic" in note for note in read_manifest(folder).notes)
    with load(folder, threads=1) as session, pytest.raises(ContextOverflowError, match="context of 160"):
        session.prefill([[5] * 160], reserve=1)


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_fp16_stays_close(target: str, checkpoints: Callable[..., Path], exports: Callable[..., Path]) -> None:
    row = np.random.default_rng(2).integers(0, 331, 60).tolist()
    with (
        load(exports("fp16", spec={"target": target}), threads=1) as ours,
        TorchSession(checkpoints(), threads=1) as theirs,
    ):
        assert ours.info.precision == "fp16"
        exact = theirs.score(row)
        difference = np.abs(ours.score(row) - exact).max() / np.abs(exact).max()
    assert 1e-6 < difference < 1e-2


def test_rope_beyond_the_original_context_matters(checkpoints: Callable[..., Path]) -> None:
    """The family test would not notice ignored scaling if scaling changed nothing."""
    row = np.random.default_rng(3).integers(0, 331, 120).tolist()
    scaled = TorchSession(checkpoints(rope_scaling=LLAMA3, rope_theta=500000.0)).score(row)
    plain = TorchSession(checkpoints(rope_theta=500000.0)).score(row)
    assert np.abs(scaled - plain).max() > 1e-2


def test_a_window_matters(checkpoints: Callable[..., Path]) -> None:
    """The family test would not notice an ignored window, or one of another length, if it changed nothing."""
    row = np.random.default_rng(3).integers(0, 331, 60).tolist()
    scores = {w: TorchSession(checkpoints(model_type="mistral", sliding_window=w)).score(row) for w in (24, 25, None)}
    assert np.abs(scores[24] - scores[25])[:24].max() == 0
    assert np.abs(scores[24] - scores[25])[25:].max() > 1e-2
    assert np.abs(scores[24] - scores[None])[25:].max() > 1e-2


@pytest.mark.parametrize(("window", "attributes", "oldest"), [(24, [24, 24], "1.24.1"), (160, [None, None], "1.20.1")])
def test_a_window_is_an_attribute_where_tokens_reach_beyond_it(
    window: int, attributes: list[int | None], oldest: str, exports: Callable[..., Path]
) -> None:
    """Up to 1.23.2 a window of W tokens reads W + 1, so those refuse the file by its version."""
    folder = exports(model_type="mistral", sliding_window=window)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = [n for n in graph.graph.node if n.op_type == "GroupQueryAttention"]
    assert [next((a.i for a in n.attribute if a.name == "local_window_size"), None) for n in nodes] == attributes
    assert read_manifest(folder).oldest_runtime == oldest
    assert graph.ir_version == (12 if window == 24 else 8)


WINDOWED = {
    "mistral": ({"model_type": "mistral", "sliding_window": 24, "max_position_embeddings": 640}, [88, 88]),
    "qwen2": ({"model_type": "qwen2", **WINDOWS, "max_window_layers": 1, "max_position_embeddings": 640}, [512, 88]),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_a_cache_of_the_windows_length(
    name: str, checkpoints: Callable[..., Path], exports: Callable[..., Path]
) -> None:
    """Prompts in chunks and steps far beyond what the cache holds, an uneven batch, rows that leave it."""
    changes, slots = WINDOWED[name]
    folder = exports(spec={"window_cache": True}, **changes)
    manifest = read_manifest(folder)
    assert manifest.oldest_runtime == "1.29.0"
    ids = np.random.default_rng(6).integers(0, 331, 500).tolist()
    rows = [ids[:5], ids[:300], ids[:33]]
    whole = TorchSession(checkpoints(**changes), attention="eager", threads=1).score(ids)
    for chunk in (0, 50):
        with load(folder, threads=1, prefill_chunk=chunk) as ours:
            close(ours.score(ids), whole)
            close(ours.prefill([ids[:90]], reserve=400)[0], whole[89])
            for k in range(90, 490):
                close(ours.step([ids[k]])[0], whole[k])
            assert [v.shape()[2] for v in ours._cache._values.values()][::2] == slots  # type: ignore[union-attr]
            found = ours.prefill(rows, reserve=150).copy()
            close(found, np.stack([whole[len(row) - 1] for row in rows]))
            for k in range(50):
                found = ours.step([ids[len(row) + k] for row in rows])
                close(found, np.stack([whole[len(row) + k] for row in rows]))
            ours.keep([0, 2])
            for k in range(50, 150):
                found = ours.step([ids[len(row) + k] for row in rows[::2]])
                close(found, np.stack([whole[len(row) + k] for row in rows[::2]]))


def test_a_cache_of_the_windows_length_needs_windows(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    for changes in ({}, {"model_type": "mistral", "sliding_window": 160}):
        with pytest.raises(UnsupportedModelError, match="--window-cache: no layer of this model has"):
            export_model(ExportSpec(str(checkpoints(**changes)), window_cache=True), tmp_path / "out")
    for target in ("tensorrt", "plain"):
        with pytest.raises(ExportError, match="--window-cache belongs to GroupQueryAttention"):
            ExportSpec("a/b", target=target, window_cache=True)
    assert ExportSpec("a/b", window_cache=True).digest != ExportSpec("a/b").digest


def without(folder: Path, to: Path, **keys: Any) -> Path:
    """A copy of a checkpoint whose config.json lacks some keys (``...``) or has other values."""
    shutil.copytree(folder, to)
    raw = json.loads((to / "config.json").read_text())
    for key, value in keys.items():
        if value is ...:
            raw.pop(key, None)
        else:
            raw[key] = value
    (to / "config.json").write_text(json.dumps(raw))
    return to


@pytest.mark.parametrize("missing", [..., None], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"model_type": "mistral", "sliding_window": None}, ("head_dim", "rope_scaling", "sliding_window")),
        ({"model_type": "qwen2"}, ("rope_scaling", "sliding_window", "layer_types", "head_dim")),
        ({"model_type": "qwen3", "head_dim": 128}, ("rope_scaling", "sliding_window", "layer_types")),
    ],
    ids=["mistral", "qwen2", "qwen3"],
)
def test_absent_and_null_keys_mean_what_they_mean_in_transformers(
    missing: Any, changes: dict[str, Any], keys: tuple[str, ...], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    if missing is None and changes["model_type"] == "qwen2":
        keys = keys[:-1]  # transformers itself cannot build a Qwen2 with head_dim: null
    if missing is ... and changes["model_type"] == "qwen3":
        keys = (*keys, "head_dim")  # 128, not hidden size by heads
    folder = without(checkpoints(**changes), tmp_path / "checkpoint", **dict.fromkeys(keys, missing))
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    row = np.random.default_rng(4).integers(0, 331, 60).tolist()
    with load(tmp_path / "out", threads=1) as ours:
        close(ours.score(row), TorchSession(folder, attention="eager", threads=1).score(row))


def config(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **changes)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        *(("mixtral", "mixtures of experts"), ("qwen2_moe", "mixtures"), ("qwen3_moe", "mixtures"), ("cohere", "")),
        *(("gemma", "add 1 to their weights"), ("gemma2", "add 1 to"), ("phi3", "are stored as one")),
    ],
)
def test_other_architectures_are_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"{model_type}.*{reason}.*llama, mistral, ministral, qwen2, qwen3.*plain"
    ):
        convert(config(model_type), ExportSpec("a/b"), "data")


@pytest.mark.parametrize(
    ("model_type", "changes", "error", "words"),
    [
        ("mistral", {"hidden_act": "gelu"}, UnsupportedModelError, "activation 'gelu'.*Mistral uses 'silu'"),
        ("mistral", {"sliding_window": 1}, BrokenCheckpointError, "sliding_window is 1, not a whole number above 1"),
        ("mistral", {"sliding_window": -8}, BrokenCheckpointError, "sliding_window is -8, not a whole"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, UnsupportedModelError, "layer_types has 'chunked_att"),
        (
            *("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
            *(BrokenCheckpointError, "names sliding_attention, but there is no sliding_window"),
        ),
        ("qwen2", {"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModelError, "rope scaling 'longrope'"),
        ("qwen3", {"head_dim": 24}, UnsupportedModelError, "head size 24 is not a multiple of 16"),
    ],
)
def test_configurations_that_the_graph_does_not_have(
    model_type: str, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    made = config(model_type)
    for key, value in changes.items():
        setattr(made, key, value)
    with pytest.raises(error, match=words):
        convert(made, ExportSpec("a/b"), "data")


def test_what_transformers_cannot_build_is_named(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """4 stumbles when it builds the model, 5 when it reads the file."""
    folder = without(checkpoints(model_type="qwen3", head_dim=32), tmp_path / "model", head_dim=None)
    with pytest.raises(BrokenCheckpointError, match=r"config\.json: transformers cannot build this model|head_dim"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_graph_would_not_use_are_refused() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.up_proj.bias"]
    ARCHITECTURES["qwen3"].require_tensors(names)
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM has tensors.*layers\.0\.self_attn\.q_norm\.weight;"
    ):
        ARCHITECTURES["llama"].require_tensors(names)
    with pytest.raises(UnsupportedModelError, match=r"model\.extra\.weight"):
        ARCHITECTURES["llama"].require_tensors(["model.extra.weight"])


def test_the_exports_own_check_reads_windows_layer_by_layer() -> None:
    from export.check import check_graph

    three = tiny_config("qwen2", **WINDOWS, num_hidden_layers=3, max_window_layers=2)

    def graphs(**spec: Any) -> tuple[Any, ExportSpec]:
        asked = ExportSpec("a/b", **spec)
        return convert(three, asked, "data").decode, asked

    graph, spec = graphs()
    first, *_, last = (n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    moved = next(a for a in last.attribute if a.name == "local_window_size")
    first.attribute.append(moved)
    last.attribute.remove(moved)
    with pytest.raises(GraphCheckError, match=r"windows are \[24, -1, -1\], not \[-1, -1, 24\]"):
        check_graph(graph, three, spec)
    graph, spec = graphs(window_cache=True)
    last = [n for n in graph.graph.node if n.op_type == "GroupQueryAttention"][-1]
    last.attribute.remove(next(a for a in last.attribute if a.name == "sliding_window_cache"))
    with pytest.raises(GraphCheckError, match=r"sliding_window_cache of the layers is \[0, 0, 0\], not \[0, 0, 1\]"):
        check_graph(graph, three, spec)
    graph, spec = graphs(target="tensorrt")
    start = next(n for n in graph.graph.node if n.op_type == "GreaterOrEqual").input[1]
    constant = next(n for n in graph.graph.node if start in n.output).input[1]
    tensor = next(t for t in graph.graph.initializer if t.name == constant)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 50, constant))
    with pytest.raises(GraphCheckError, match=r"the mask's attention windows are \[74\], not \[24\]"):
        check_graph(graph, three, spec)


def test_a_mistral_with_layer_types_is_a_ministral(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """transformers says so when it reads the file."""
    kinds = ["sliding_attention", "full_attention"]
    model = checkpoints(model_type="mistral", sliding_window=24, head_dim=16)
    folder = without(model, tmp_path / "model", layer_types=kinds)
    manifest, _ = export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert manifest.model_type == "ministral"
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["type"] == "mistral"


@pytest.mark.parametrize(("changes", "fused"), [({}, True), ({"hidden_act": "gelu"}, False), ({"head_dim": 8}, False)])
def test_what_can_have_no_fused_export_gets_the_plain_one(changes: dict[str, Any], fused: bool) -> None:
    assert has_fused_export(tiny_config("qwen2", **changes)) is fused
    assert not has_fused_export(config("mixtral"))
