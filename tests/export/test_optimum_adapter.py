"""The graph is the same with optimum's classes and with our own; what needs optimum says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import optimum_adapter
from export.architectures import ARCHITECTURES
from export.convert import convert
from export.optimum_adapter import OwnModelPatcher, require_optimum
from export.spec import ExportSpec
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[2]
SPECS = ({}, {"precision": "int4"}, {"target": "tensorrt", "precision": "fp16"})
WITHOUT = """
import sys
sys.modules["optimum"] = None
from pathlib import Path
from export.optimum_adapter import IMPORT_ERROR
from tests.export.test_optimum_adapter import write_graphs
assert "optimum" in IMPORT_ERROR
write_graphs(Path(sys.argv[1]))
"""


def write_graphs(out: Path) -> None:
    for model_type in ARCHITECTURES:
        for k, spec in enumerate(SPECS):
            made = convert(tiny_config(model_type, head_dim=16), ExportSpec("a/b", **spec), "data")
            for name in ("decode", "scoring"):
                content = getattr(made, name).SerializeToString(deterministic=True)
                (out / f"{model_type}-{k}-{name}").write_bytes(content)


def test_graphs_equal_optimums_to_the_last_byte(tmp_path: Path) -> None:
    require_optimum("this test")
    ours, theirs = tmp_path / "ours", tmp_path / "optimum"
    ours.mkdir()
    theirs.mkdir()
    write_graphs(theirs)
    subprocess.run([sys.executable, "-c", WITHOUT, str(ours)], check=True, cwd=ROOT)
    assert len(list(theirs.iterdir())) == 2 * len(ARCHITECTURES) * len(SPECS)
    different = [p.name for p in theirs.iterdir() if p.read_bytes() != (ours / p.name).read_bytes()]
    assert different == []


def test_the_model_is_as_before_afterwards(checkpoints: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints()).eval()
    before = model(torch.tensor([[5, 6, 7]])).logits
    patcher = OwnModelPatcher(SimpleNamespace(), model)
    past = [(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))] * 2
    with patcher:
        found = model(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64), past_key_values=past)
    assert torch.allclose(found["logits"], before, atol=1e-6)
    assert [k.shape for k, _ in found["past_key_values"]] == [(1, 2, 3, 16)] * 2
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_what_needs_optimum_says_so_in_a_line(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bench.cli.main import main

    monkeypatch.setattr(optimum_adapter, "IMPORT_ERROR", "cannot import name 'X'")
    assert main(["export", str(checkpoints()), str(tmp_path / "out"), "--target", "plain"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: --target plain needs optimum, which cannot be imported (cannot import name 'X')")
    assert "transformers<4.58 and optimum-onnx" in said
    assert not (tmp_path / "out").exists()
