"""Third-party exports run here, and ours run elsewhere: the real packages, greedy tokens equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.manifest import ManifestError, read_manifest
from export.optimum_adapter import require_optimum
from runtime.errors import SessionError
from runtime.foreign import ForeignFolderError
from runtime.generate import generate
from runtime.loading import load, read_folder
from runtime.trust import UntrustedModelError

Folders = Callable[..., Path]
PROMPT = [7, 19, 8, 12, 9]
NEW = 24
WINDOW_CACHE = {"local_window_size": 24, "sliding_window_cache": 1}


@pytest.fixture(scope="module")
def optimum_folder(checkpoints: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What optimum itself writes."""
    from bench.peers.exports import optimum_export

    out = tmp_path_factory.mktemp("optimum") / "plain"
    optimum_export(checkpoints(), out, "plain")
    return out


@pytest.fixture
def unsigned(exports: Folders, tmp_path: Path) -> Path:
    """Our export without its manifest: as far as anyone can tell, a third-party export."""
    folder = tmp_path / "unsigned"
    shutil.copytree(exports(), folder)
    (folder / "manifest.json").unlink()
    return folder


def _greedy(folder: Path) -> list[int]:
    with load(folder, threads=1) as session:
        return list(generate(session, [PROMPT], NEW).tokens[0])


def test_optimums_folder_runs_here(optimum_folder: Path, exports: Folders) -> None:
    manifest = read_folder(optimum_folder)
    assert (manifest.attention, manifest.precision, manifest.decode_logits) == ("unfused", "fp32", "all")
    assert (manifest.kv.layers, manifest.kv.kv_heads, manifest.kv.head_dim) == (2, 2, 16)
    assert (manifest.vocab_size, manifest.context_length, manifest.eos_token_ids) == (331, 160, (2,))
    assert any("identity is not known" in note for note in manifest.notes)
    assert _greedy(optimum_folder) == _greedy(exports())


def test_a_fused_folder_without_manifest_is_recognised(unsigned: Path, exports: Folders) -> None:
    found, told = read_folder(unsigned), read_manifest(exports())
    same = ("precision", "activations", "attention", "padding", "decode_logits", "kv", "node_count", "inputs", "opset")
    for name in (*same, "vocab_size", "context_length", "eos_token_ids", "decode_weight_bytes", "parameters"):
        if name not in ("decode_weight_bytes", "parameters"):
            assert getattr(found, name) == getattr(told, name), name
    # The small norm weights and rotary tables are counted a little differently; the matrices are not.
    assert abs(found.decode_weight_bytes - told.decode_weight_bytes) < 0.01 * told.decode_weight_bytes
    assert _greedy(unsigned) == _greedy(exports())


def test_quantised_folder_without_manifest(exports: Folders, tmp_path: Path) -> None:
    shutil.copytree(exports("int4", spec={"method": "rtn"}), tmp_path / "q")
    (tmp_path / "q" / "manifest.json").unlink()
    manifest = read_folder(tmp_path / "q")
    assert manifest.quantisation is not None
    assert (manifest.precision, manifest.activations) == ("int4", "fp32")
    assert (manifest.quantisation.block_size, manifest.quantisation.accuracy_level) == (32, 4)
    assert any("int8 21,184" in note for note in manifest.notes)  # the head


def test_ours_runs_in_optimum(exports: Folders) -> None:
    torch = pytest.importorskip("torch")
    require_optimum("this test")
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(exports(), use_io_binding=False)
    ids = torch.tensor([PROMPT])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert out[0, len(PROMPT) :].tolist() == _greedy(exports())
    padded = torch.tensor([PROMPT, [0, 0, 0, *PROMPT[:2]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    with pytest.raises(Exception, match="left_padded_batch_refused__pad_on_the_right"):
        model.generate(input_ids=padded, attention_mask=mask, **options)


WINDOWS = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 11, "head_dim": 32},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", **WINDOWS},
        {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 32, **WINDOWS},
    ],
    ids=["llama", "mistral", "qwen2", "qwen2-windows", "qwen3", "qwen3-windows"],
)
def test_ours_runs_in_genai(changes: dict[str, Any], exports: Folders) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(exports(**changes)))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.array([PROMPT], np.int32))
    tokens = []
    while not generator.is_done() and len(tokens) < NEW:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert len(tokens) > 8
    assert tokens == _greedy(exports(**changes))[: len(tokens)]


def test_genais_own_layout_runs_here(unsigned: Path, exports: Folders) -> None:
    """Its graph leaves the head size open and gives all logits; its configuration names graph and context."""
    model = onnx.load(unsigned / "model_scoring.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    for name in ("model.onnx", "model_scoring.onnx", "config.json", "generation_config.json"):
        (unsigned / name).unlink()
    onnx.save(model, unsigned / "decoder.onnx")
    config = json.loads((unsigned / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    (unsigned / "genai_config.json").write_text(json.dumps(config))
    manifest = read_folder(unsigned)
    assert (manifest.kv.head_dim, manifest.context_length, manifest.decode_logits) == (16, 160, "all")
    assert manifest.eos_token_ids == (2,)
    assert _greedy(unsigned) == _greedy(exports())


@pytest.mark.parametrize(
    "what",
    ["no graph", "merged", "no past", "other names", "strange input", "two sizes", "bad config", "short caches"],
)
def test_unknown_layouts_are_refused_by_name(what: str, unsigned: Path) -> None:
    path = unsigned / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    named = {
        "no graph": "manifest.json nor a graph",
        "merged": "merged",
        "no past": "KV cache",
        "other names": "past_0",
        "strange input": "token_type_ids",
        "two sizes": "of several sizes",
        "bad config": "config.json",
        "short caches": "windowed_kv_cache=false",
    }[what]
    if what == "no graph":
        path.rename(unsigned / "other.onnx")
    elif what == "merged":
        empty = helper.make_graph([], "branch", [], [])
        node = helper.make_node("If", ["input_ids"], [], then_branch=empty, else_branch=empty)
        model.graph.node.append(node)
    elif what == "no past":
        kept = [i for i in model.graph.input if not i.name.startswith("past")]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    elif what == "other names":
        next(i for i in model.graph.input if i.name == "past_key_values.0.key").name = "past_0"
    elif what == "two sizes":
        value = next(i for i in model.graph.input if i.name == "past_key_values.1.value")
        value.type.tensor_type.shape.dim[3].dim_value = 24
    elif what == "short caches":  # as onnxruntime-genai 0.18 builds Qwen2 with windows
        node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
        node.attribute.extend(helper.make_attribute(n, v) for n, v in WINDOW_CACHE.items())
    elif what == "strange input":
        model.graph.input.append(helper.make_tensor_value_info("token_type_ids", 7, [1, 1]))
    else:
        (unsigned / "genai_config.json").unlink()
        (unsigned / "config.json").write_text("[1, 2")
    if what not in ("no graph", "bad config"):
        onnx.save(model, path)
    with pytest.raises(SessionError, match=named):
        read_folder(unsigned)


@pytest.mark.parametrize("passed", ["the repository", "its onnx folder"])
@pytest.mark.parametrize("graph", ["model.onnx", "model_quantized.onnx"])
def test_graphs_in_a_folder_below_their_configuration(passed: str, graph: str, unsigned: Path) -> None:
    below = unsigned / "onnx"
    below.mkdir()
    (unsigned / "genai_config.json").unlink()
    (unsigned / "model_scoring.onnx").unlink()
    (unsigned / "model.onnx").rename(below / graph)
    (unsigned / "model.onnx.data").rename(below / "model.onnx.data")
    with pytest.raises(ForeignFolderError, match=r"graphs in onnx/ .* into one folder") as caught:
        read_folder(unsigned if passed == "the repository" else below)
    assert graph in str(caught.value)
    for name in ("config.json", "generation_config.json"):  # what the message says
        shutil.copyfile(unsigned / name, below / name)
    (below / graph).rename(below / "model.onnx")
    assert read_folder(below).context_length == 160


def test_what_may_not_be_trusted_is_refused_before_it_is_opened(exports: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(exports(), folder)
    (folder / "custom_ops.so").write_bytes(b"\x7fELF")
    with pytest.raises(UntrustedModelError, match=r"custom_ops\.so"):
        load(folder)
    (folder / "custom_ops.so").unlink()
    (folder / "manifest.json").unlink()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].domain = "evil.corp"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(UntrustedModelError, match=r"evil\.corp"):
        load(folder)


def test_a_manifest_cannot_point_at_a_graph_that_has_no_hash(exports: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "swapped"
    shutil.copytree(exports(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["decode_graph"] = "other.onnx"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(folder / "model.onnx", folder / "other.onnx")
    with pytest.raises(ManifestError, match="decode_graph"):
        load(folder)


def test_no_folder() -> None:
    with pytest.raises(ManifestError, match="no exported folder"):
        read_folder("/nonexistent/folder")
    assert issubclass(ForeignFolderError, SessionError)


def test_our_own_two_graphs_without_their_manifest(unsigned: Path, exports: Folders) -> None:
    manifest = read_folder(unsigned)
    assert (manifest.decode_graph, manifest.scoring_graph) == ("model.onnx", "model_scoring.onnx")
    assert manifest.decode_logits == "last"
    with load(unsigned, threads=1) as found, load(exports(), threads=1) as wanted:
        assert np.array_equal(found.score(PROMPT), wanted.score(PROMPT))
        assert np.array_equal(found.prefill([PROMPT]), wanted.prefill([PROMPT]))


@pytest.mark.parametrize("role", ["decode_graph", "scoring_graph"])
@pytest.mark.parametrize("name", ["hidden.bin", "hidden.ort"])
def test_a_graph_that_no_look_would_find(role: str, name: str, exports: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(exports(), tmp_path / "hidden")
    shutil.copyfile(folder / "model.onnx", folder / name)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = raw["files"]["model.onnx"]
    raw[role] = name
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=r"does not end in \.onnx"):
        read_folder(folder)


def test_a_manifest_that_never_ends(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match="no regular file"):
        read_folder(tmp_path)
