"""Settings are judged by what they do: what changes nothing passes, what another program would read is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.gate.found import Found
from bench.gate.modes import MODES
from bench.gate.registry import BY_NAME
from bench.gate.validate import make_subject
from runtime.text import load_tokenizer

Folders = Callable[..., Path]
Look = Callable[..., Found]


def changed(path: Path, **settings: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | settings).items() if v is not ...}))


@pytest.fixture
def folder(exports: Folders, tmp_path: Path) -> Path:
    """Our export without its manifest."""
    shutil.copytree(exports(), tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").unlink()
    return tmp_path / "folder"


@pytest.fixture
def look(checkpoints: Folders) -> Look:
    def run(check: str, folder: Path, checkpoint: Path | None = None) -> Found:
        return BY_NAME[check].run(make_subject(folder, str(checkpoint or checkpoints()), MODES["quick"]))

    return run


SAME: dict[str, dict[str, Any]] = {
    "one end token in a list": {"eos_token_id": [2]},
    "epsilon as fp32 has it": {"rms_norm_eps": float(np.float32(1e-6))},
    "saved by transformers 5": {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": ...,
        "rope_scaling": ...,
    },
    "a key that no loader reads": {"transformers.js_config": {"dtype": "q4"}},
    "no architectures": {"architectures": ...},
}
OTHER: dict[str, dict[str, Any]] = {
    "architectures": {"architectures": ["MistralForCausalLM"]},
    "eos_token_id": {"eos_token_id": [2, 3]},
    "rms_norm_eps": {"rms_norm_eps": 1.1e-6},
    "rope_theta": {"rope_parameters": {"rope_theta": 10001.0, "rope_type": "default"}, "rope_theta": ...},
    "sliding_window": {"sliding_window": 64},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("case", SAME)
def test_another_spelling_of_the_configuration_passes(folder: Path, look: Look, case: str) -> None:
    changed(folder / "config.json", **SAME[case])
    found = look("config", folder)
    assert found.status == "PASS", found.summary
    assert bool(found.notes) == (case == "a key that no loader reads")


@pytest.mark.parametrize("key", OTHER)
def test_another_configuration_is_named(folder: Path, look: Look, key: str) -> None:
    changed(folder / "config.json", **OTHER[key])
    found = look("config", folder)
    assert (found.status, found.findings[0].where) == ("FAIL", f"config.json, {key}")


def test_the_side_of_padding_changes_no_text(folder: Path, look: Look) -> None:
    changed(folder / "tokenizer_config.json", padding_side="left", truncation_side="left")
    assert look("tokenizer", folder).status == "PASS"


def test_a_template_that_adds_no_token_changes_no_ids(folder: Path, look: Look) -> None:
    """As transformers 5 saves a tokenizer that had none."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    text, pair = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [text], "pair": [text, pair], "special_tokens": {}}
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": template}))
    assert look("tokenizer", folder).status == "PASS"
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template |= {"single": [start, text], "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": template}))
    assert look("tokenizer", folder).status == "FAIL"


def test_a_setting_that_changes_text_is_named_with_its_effect(folder: Path, look: Look) -> None:
    changed(folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    found = look("tokenizer", folder)
    assert found.status == "FAIL"
    assert found.findings[0].what.endswith("which changes blanks in decoded text")


def _in_tokenizer(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][-1]["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def _in_config(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = load_tokenizer(folder).added_tokens_decoder  # transformers 5 does not write it into this file
    raw["added_tokens_decoder"] = {str(i + 5): {"content": t.content, "special": t.special} for i, t in decoder.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))


def _in_added(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<u>": 4}))


@pytest.mark.parametrize("shift", [_in_tokenizer, _in_config, _in_added])
def test_shifted_ids_of_added_tokens_are_named(folder: Path, look: Look, shift: Callable[[Path], None]) -> None:
    """transformers goes by the vocabulary and shows nothing; other readers go by the file."""
    shift(folder)
    found = look("tokenizer", folder)
    assert found.status == "FAIL", found.summary
    assert any("has the id" in f.what or "added token" in f.where for f in found.findings)


def test_generation_settings_of_genais_layout_stand_elsewhere(folder: Path, look: Look, exports: Folders) -> None:
    (folder / "generation_config.json").unlink()
    assert look("generation_config", folder).status == "REPORTED"
    (folder / "genai_config.json").unlink()
    assert look("generation_config", folder).status == "FAIL"


def test_an_export_without_end_token_passes_with_a_note(exports: Folders, checkpoints: Folders, look: Look) -> None:
    found = look("special_ids", exports(eos_token_id=None), checkpoints(eos_token_id=None))
    assert found.status == "PASS", found.summary
    assert "ends at token 0" in found.notes[0]


def test_weights_that_another_program_would_load_are_the_baselines(
    exports: Folders, checkpoints: Folders, look: Look, tmp_path: Path
) -> None:
    for sealed in (True, False):
        folder = tmp_path / f"{sealed}"
        shutil.copytree(exports(), folder)
        if not sealed:
            (folder / "manifest.json").unlink()
        good = "PASS" if sealed else "REPORTED"
        copy = folder / "model.safetensors"
        shutil.copyfile(checkpoints() / "model.safetensors", copy)
        assert look("files", folder).status == good
        tensors = load_file(copy)
        save_file({k: v.double() for k, v in tensors.items()}, copy)
        assert look("files", folder).status == good
        tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
        save_file(tensors, copy)
        found = look("files", folder)
        assert (found.status, found.findings[0].where) == ("FAIL", "model.safetensors")


def test_odd_files_are_findings_not_exceptions(folder: Path, look: Look) -> None:
    changed(folder / "config.json", eos_token_id=[2, None])
    found = look("config", folder)
    (finding,) = found.findings
    assert (found.status, "eos_token_id" in finding.where + finding.what) == ("FAIL", True)
    (folder / "foo.safetensors").symlink_to("nowhere")
    found = look("files", folder)
    assert (found.status, "leads nowhere" in found.summary) == ("FAIL", True)


def test_a_folder_in_the_hubs_cache_is_read_and_hashed(folder: Path, look: Look, tmp_path: Path) -> None:
    from bench.digests import DigestError, hash_folder

    snapshot, blobs = (tmp_path / "models--a--b" / part for part in ("snapshots/0a1b", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for k, path in enumerate(sorted(folder.iterdir())):
        blob = blobs / f"{k:040x}"
        path.replace(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert look("files", snapshot).status == "REPORTED"
    assert hash_folder(snapshot).keys() == {p.name for p in snapshot.iterdir()}
    outside = tmp_path / "config.json"
    (snapshot / "config.json").resolve().replace(outside)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(DigestError, match=r"config\.json is a link out of it"):
        hash_folder(snapshot)
