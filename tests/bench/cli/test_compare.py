"""``llama-onnx compare --model``: what the gate's process ended with, and what it is asked."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.cli import compare
from bench.errors import BenchError
from bench.latency.sides import SideSpec
from reports.validation import Validation
from tests.reports.validation_examples import example_validation

Ended = Callable[[int, str, Validation | None], list[list[str]]]
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nZeroDivisionError: division by zero\n'


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    """What ``measure_parity`` reads of the arguments."""
    return argparse.Namespace(model="demo", mode="quick", dataset=None, expect=None, out=tmp_path)


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
