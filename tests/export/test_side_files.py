"""What belongs to a model beside its weights is what transformers reads, from a folder and from the hub alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.errors import BrokenCheckpointError, DestinationError, UnsupportedModelError
from export.manifest import SIDE_FILES, TOKENIZER_FILES, files_of, read_manifest, verify_files
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec
from runtime.text import load_tokenizer

Checkpoints = Callable[..., Path]
TEXTS = ["<|im_start|>the cat<|im_end|> 123", "why  big\n dogs", "naïve 🙂"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def without_tokenizer(checkpoints: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    def get(**changes: Any) -> Path:
        folder = shutil.copytree(checkpoints(**changes), tmp_path / "repository")
        for name in files_of(folder, TOKENIZER_FILES):
            (folder / name).unlink()
        return folder

    return get


@pytest.fixture
def llama_2(without_tokenizer: Callable[..., Path], sentencepiece_model: Path) -> Path:
    """tokenizer.model and added_tokens.json, as many fine-tuned LLaMA 2 have it, and nothing else."""
    folder = without_tokenizer(vocab_size=340)
    shutil.copyfile(sentencepiece_model, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 331, "<|im_end|>": 332}))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of one repository: the folder that is returned, of which only what is asked for is fetched."""

    def snapshot_download(*_: str, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        from huggingface_hub.utils import filter_repo_objects

        home = tmp_path / "repository"
        names = [p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, tmp_path / "fetched" / name)
        return str(tmp_path / "fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return tmp_path / "repository"


def ids(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.slow
def test_the_list_has_the_files_of_every_tokenizer_class() -> None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    classes = [tokenizer_class_from_name(n) for pair in TOKENIZER_MAPPING_NAMES.values() for n in pair if n]
    names = {n for c in classes for n in getattr(c, "vocab_files_names", {}).values()}
    assert len(names) > 20
    unused = {"vocab.pkl", "vocab.bin", "artists.json", "genres.json", "lyrics.json"}  # pickles; not of language models
    assert {n for n in names if not any(fnmatch(n, p) for p in SIDE_FILES)} == unused


@pytest.mark.parametrize("target", ["ort", "plain"])
def test_a_sentencepiece_model_works_out_of_the_box(llama_2: Path, target: str, tmp_path: Path) -> None:
    manifest, _ = export_model(ExportSpec(str(llama_2), target=target), tmp_path / "out")
    right = ids(resolve(str(llama_2)).folder)
    assert right[0][:2] == [1, 331]  # transformers knows the added token
    assert ids(tmp_path / "out") == right
    assert manifest.files.keys() >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "added_tokens.json"}
    (tmp_path / "out" / "tokenizer.model").unlink()
    assert ids(tmp_path / "out") == right  # tokenizer.json says it all
    for row in right:
        assert load_tokenizer(tmp_path / "out").decode(row) == load_tokenizer(llama_2).decode(row)


def test_the_hub_gives_what_the_folder_has(hub: Path, llama_2: Path) -> None:
    (hub / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "original/tokenizer.model", "README.md"):
        (hub / name).write_bytes(b"x")
    (hub / "additional_chat_templates").mkdir()
    (hub / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (hub / "chat_template.jinja").write_text("plain")
    fetched = resolve("someone/some-llama").folder
    assert ids(fetched) == ids(resolve(str(hub)).folder)
    assert load_tokenizer(fetched).chat_template == {"default": "plain", "tool_use": "tools"}
    assert {p.relative_to(fetched).as_posix() for p in fetched.rglob("*") if p.is_file()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "added_tokens.json"),
        *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer_config.json"),
    }


def test_an_adapter_on_the_hub_is_refused(hub: Path, llama_2: Path) -> None:
    (hub / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        resolve("someone/some-llama")


def test_pickles_are_fetched_where_they_are_allowed(hub: Path, llama_2: Path, tmp_path: Path) -> None:
    weights = load_file(hub / "model.safetensors")
    torch.save(weights, hub / "pytorch_model.bin")
    assert resolve("someone/some-llama", allow_pickle=True).origin == "hub someone/some-llama"
    assert not (tmp_path / "fetched/pytorch_model.bin").exists()  # safetensors are there
    shutil.rmtree(tmp_path / "fetched")
    (hub / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match="--allow-pickle"):
        resolve("someone/some-llama")
    found = resolve("someone/some-llama", allow_pickle=True)
    assert (found.name, found.origin) == ("someone/some-llama", "hub someone/some-llama, unpickled")
    assert load_file(next(found.folder.glob("*.safetensors"))).keys() == weights.keys()
    assert ids(found.folder) == ids(resolve(str(hub), allow_pickle=True).folder)


def test_every_chat_template_reaches_the_export(llama_2: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    (llama_2 / "additional_chat_templates").mkdir()
    (llama_2 / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (llama_2 / "chat_template.jinja").write_text("plain")
    both = {"default": "plain", "tool_use": "tools"}
    export_model(ExportSpec(str(llama_2)), tmp_path / "out")
    verify_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert load_tokenizer(tmp_path / "out").chat_template == both
    raw = json.loads((llama_2 / "config.json").read_text())
    newer = shutil.copytree(llama_2, tmp_path / "newer")
    (newer / "config.json").write_text(json.dumps(raw | {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": None}))
    assert load_tokenizer(resolve(str(newer)).folder).chat_template == both
    torch.save(load_file(newer / "model.safetensors"), newer / "pytorch_model.bin")
    (newer / "model.safetensors").unlink()
    assert load_tokenizer(resolve(str(newer), allow_pickle=True).folder).chat_template == both


def test_changed_merges_are_another_checkpoint(without_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    folder = without_tokenizer()
    names = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he"]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "bos_token": "<unk>", "eos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = ExportSpec(str(folder))
    export_model(spec, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").tokenize("the") == ["th", "e"]
    assert not export_model(spec, tmp_path / "out")[1]
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    with pytest.raises(DestinationError, match="before its files changed"):
        export_model(spec, tmp_path / "out")
    export_model(spec, tmp_path / "out", force=True)
    assert load_tokenizer(tmp_path / "out").tokenize("the") == ["t", "he"]


def test_one_template_for_every_reader(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """transformers takes the file, onnxruntime-genai what stands in tokenizer_config.json."""
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    settings = folder / "tokenizer_config.json"
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps(raw | {"chat_template": "another"}))
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    export_model(ExportSpec(str(folder)), tmp_path / "inline")
    assert load_tokenizer(tmp_path / "inline").chat_template == "another"


def test_a_tokenizer_that_cannot_be_loaded_is_named(llama_2: Path, tmp_path: Path) -> None:
    (llama_2 / "tokenizer.model").write_bytes(b"no model at all")
    said: list[str] = []
    manifest, _ = export_model(ExportSpec(str(llama_2)), tmp_path / "out", status=said.append)
    assert manifest.notes[-1].startswith("the tokenizer was copied, but cannot be loaded here: ")
    assert manifest.notes[-1] in said
