"""Every command that resolves a model passes ``--allow-pickle`` on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cli import compare
from bench.cli.main import main
from bench.errors import BenchError
from bench.suite.options import add_options
from bench.suite.run import Run
from export import source

Folders = Callable[..., Path]


@pytest.fixture
def asked(exports: Folders, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each local folder was resolved with; none is."""
    exports()  # made before nothing can be resolved
    seen: list[bool] = []

    def stop(_folder: Path, _status: Any, allow_pickle: bool, *_: Any) -> None:
        seen.append(allow_pickle)
        raise source.ModelNotFoundError("resolved")

    monkeypatch.setattr(source, "_local", stop)
    return seen


COMMANDS = {
    "export": "export {model} {tmp}/out",
    "validate": "validate {folder} --baseline {model} --out {tmp}/page",
    "perplexity": "perplexity {folder} --baseline {model} --dataset {data}",
    "certify": "certify {tmp}/result.json {folder} --baseline {model} --certificate {tmp}/certificate",
    "verify": "verify {tmp}/certificate {folder} --baseline {model}",
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_passes_it_on(command: str, given: bool, asked: list[bool], exports: Folders, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"id": "a", "task": "perplexity", "text": "the cat sat on a mat"}))
    places = {"model": tmp_path, "folder": exports(), "tmp": tmp_path, "data": data}
    typed = [part.format(**places) for part in COMMANDS[command].split()]
    assert main([*typed, *["--allow-pickle"] * given]) == 2
    assert asked == [given]


@pytest.mark.parametrize("given", [True, False])
def test_the_suite_passes_it_on(given: bool, asked: list[bool], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument)
    run = Run(parser.parse_args(["--model", str(tmp_path), *["--allow-pickle"] * given]))
    with pytest.raises(source.ModelNotFoundError):
        _ = run.source
    assert asked == [given]


def test_compare_passes_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> Any:
        seen.append(command)
        return SimpleNamespace(returncode=2, stderr="")

    monkeypatch.setattr("subprocess.run", ran)
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    side: Any = SimpleNamespace(folder="x", as_options=list)
    for given in (True, False):
        args = parser.parse_args(["--model", "m", "--out", str(tmp_path), *["--allow-pickle"] * given])
        with pytest.raises(BenchError):
            compare.measure_parity(args, side)
        assert ("--allow-pickle" in seen.pop()) == given


def test_a_pickled_baseline_is_the_same_model(
    checkpoints: Folders, exports: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(checkpoints(), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    typed = ["validate", str(exports()), "--baseline", str(folder), "--only", "weights", "--out", str(tmp_path / "o")]
    assert main(typed) == 2
    assert main([*typed, "--allow-pickle"]) == 0
    (result,) = json.loads((tmp_path / "o" / "validation.json").read_text())["results"]
    assert (result["name"], result["status"]) == ("weights", "PASS")
