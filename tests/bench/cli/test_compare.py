"""``llama-onnx compare``: what the gate's process ended with and what it is asked, and several files a side."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.cli import compare
from bench.cli.main import main
from bench.errors import BenchError
from bench.latency.sides import SideSpec
from reports.validation import Validation
from tests.reports.test_case_files import benchmark_json
from tests.reports.validation_examples import example_validation

Ended = Callable[[int, str, Validation | None], list[list[str]]]
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nZeroDivisionError: division by zero\n'


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    """What ``measure_parity`` reads of the arguments."""
    return argparse.Namespace(model="demo", mode="quick", dataset=None, expect=None, out=tmp_path, allow_pickle=False)


@pytest.fixture
def gate_ends(monkeypatch: pytest.MonkeyPatch, asked: argparse.Namespace) -> Ended:
    """In place of the gate's process: its exit code, its last lines, the document that it writes."""

    def set_end(code: int, said: str, document: Validation | None) -> list[list[str]]:
        commands: list[list[str]] = []

        def ended(command: list[str], **_: object) -> SimpleNamespace:
            commands.append(command)
            if document is not None:
                write(asked.out, document)
            return SimpleNamespace(returncode=code, stderr=said)

        monkeypatch.setattr(subprocess, "run", ended)
        return commands

    return set_end


def write(out: Path, document: Validation) -> None:
    (out / "validation").mkdir(exist_ok=True)
    (out / "validation" / "validation.json").write_text(document.model_dump_json(), encoding="utf-8")


def test_an_exit_code_of_a_verdict_without_its_document_is_an_error(
    asked: argparse.Namespace, gate_ends: Ended
) -> None:
    candidate = SideSpec("candidate", "folder", "folder")
    failed = example_validation(failing="mean_kld")
    assert failed.exit_code == 1
    gate_ends(1, "", failed)
    assert compare.measure_parity(asked, candidate) == failed
    write(asked.out, failed)  # an earlier run's
    gate_ends(1, TRACEBACK, None)
    with pytest.raises(BenchError, match=r"exit code 1\): ZeroDivisionError: division by zero"):
        compare.measure_parity(asked, candidate)
    gate_ends(1, TRACEBACK, example_validation())  # it died after the document was written
    with pytest.raises(BenchError, match="ZeroDivisionError"):
        compare.measure_parity(asked, candidate)
    gate_ends(4, "error: no GPU\n", None)
    with pytest.raises(BenchError, match=r"exit code 4\): no GPU"):
        compare.measure_parity(asked, candidate)


def test_what_the_candidate_has_to_be_is_passed_on(
    asked: argparse.Namespace, gate_ends: Ended, exports: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    commands = gate_ends(0, "", example_validation())
    candidate = SideSpec("candidate", "folder", "folder")
    compare.measure_parity(asked, candidate)
    asked.expect = "precision=int4,target=ort"
    compare.measure_parity(asked, candidate)
    assert "--expect" not in commands[0]
    assert commands[1][-2:] == ["--expect", asked.expect]
    sides = ["compare", "--base", str(exports()), "--candidate", str(exports()), "--out", str(asked.out / "out")]
    assert main([*sides, "--model", "demo", "--expect", "precision=int5"]) == 2
    assert "cannot be met by any folder" in capsys.readouterr().err
    assert main([*sides, "--expect", "precision=int4"]) == 2
    assert "--model" in capsys.readouterr().err
    assert not (asked.out / "out").exists()


def test_several_files_a_side_are_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files: dict[str, list[str]] = {}
    for side, level in (("base", 0.1), ("candidate", 0.15)):
        for k in range(5):
            path = tmp_path / f"{side}{k}.json"
            path.write_text(json.dumps(benchmark_json(stats={"data": [level + k / 10_000, level]})))
            files.setdefault(side, []).append(str(path))
    out = ["--out", str(tmp_path / "out")]
    command = ["compare", "--base-files", *files["base"], "--candidate-files", *files["candidate"]]
    assert main([*command, *out]) == 1
    assert "base0.json and 4 more" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    capsys.readouterr()
    assert main(["compare", files["base"][0], files["candidate"][0], *out]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "5 or more processes a side decide" in said
    one = files["base"][0]
    for wrong in (["compare", one, *command[1:]], [*command, "--base", "x"], command[:3], ["compare", one]):
        assert main(wrong) == 2
        assert "--base-files" in capsys.readouterr().err
