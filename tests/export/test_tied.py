"""A head that is tied to the embedding: two names of one tensor, of which a checkpoint may store either or both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.errors import BrokenCheckpointError
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec
from runtime.errors import SessionError
from runtime.loading import load
from runtime.torch_session import TorchSession

Checkpoints = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = [5, 7, 9, 11]


def stored(source: Path, target: Path, embedding: bool, head: bool, off: float = 0.0) -> Path:
    """A tied checkpoint that stores these of the two names; the head's values are ``off``."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING] + off
    for name in [n for n, kept in ((EMBEDDING, embedding), (HEAD, head)) if not kept]:
        del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def tied(checkpoints: Checkpoints) -> Path:
    return checkpoints(tie_word_embeddings=True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_either_name_is_the_same_model(precision: str, tied: Path, tmp_path: Path) -> None:
    expected = TorchSession(tied, threads=1).score(IDS)
    for name, embedding in (("head", False), ("both", True)):
        folder = stored(tied, tmp_path / name, embedding=embedding, head=True)
        source = resolve(str(folder))
        np.testing.assert_array_equal(TorchSession(source.folder, threads=1).score(IDS), expected)
        out = tmp_path / f"{name}-onnx"
        spec = ExportSpec(str(folder), precision, keep_float="none" if precision == "int8" else None)
        export_model(spec, out)
        found = load(out, "cpu", 1).score(IDS)
        np.testing.assert_allclose(found, expected, atol=1e-4 if precision == "fp32" else 0.2)


def test_a_gptq_export_calibrates_on_it(tied: Path, calibration: tuple[str, ...], tmp_path: Path) -> None:
    for name, embedding in (("head", False), ("both", True)):
        folder = stored(tied, tmp_path / name, embedding=embedding, head=True)
        export_model(ExportSpec(str(folder), "int4", method="gptq"), tmp_path / f"{name}-onnx", calibration=calibration)
    made = [load(tmp_path / f"{name}-onnx", "cpu", 1).score(IDS) for name in ("head", "both")]
    np.testing.assert_array_equal(*made)


def test_two_that_differ_are_refused(tied: Path, tmp_path: Path) -> None:
    folder = stored(tied, tmp_path / "differ", embedding=True, head=True, off=0.001)
    with pytest.raises(BrokenCheckpointError, match="tie_word_embeddings") as caught:
        resolve(str(folder))
    assert EMBEDDING in str(caught.value)
    assert HEAD in str(caught.value)


def test_an_untied_head_is_its_own(checkpoints: Checkpoints) -> None:
    folder = checkpoints()
    assert resolve(str(folder)).folder == folder


def test_the_names_are_the_architectures(tmp_path: Path, tokenizer_in: Callable[[Path], None]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=331, n_positions=32)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer_in(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    tensors = load_file(path)
    tensors[HEAD] = tensors.pop("transformer.wte.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    found = TorchSession(resolve(str(path.parent)).folder, threads=1).score(IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    tensors["wte.weight"] = tensors[HEAD] * 2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match=r"wte\.weight"):
        resolve(str(path.parent))


def test_a_baseline_that_lacks_a_tensor_is_not_made_up(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SessionError, match=r"lacks 1 .* model\.layers\.1\.mlp\.up_proj"):
        TorchSession(folder, threads=1)
