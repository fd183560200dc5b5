"""The progress bar: units, bytes, stages of unknown length; nothing where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench.progress import hashing, progress


def test_units_stages_and_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(stderr=True, force_terminal=True, width=100)
    with progress("validate", console=console) as bar:
        bar.say("reading the folder")
        bar.at(2, 3)
        bar.at(1, 6)  # another stage
        bar.say("scoring window 1 of 6 [bold]")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "1/6" in shown.err
    assert "scoring window 1 of 6 [bold]" in shown.err
    assert "0:00:0" in shown.err
    with progress("pairs", 3, console=console) as bar:
        bar.tick("the first")
        bar.tick("the second")
    assert "2/3" in capsys.readouterr().err


def test_bytes_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"x" * 3000)
    with hashing(tmp_path, tmp_path / "not there") as on_chunk:
        on_chunk(1000)
        on_chunk(1000)
    assert "2.0/3.0 kB" in capsys.readouterr().err


def test_no_terminal_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("pairs", 3) as bar:
        bar.tick("the first")
    assert capsys.readouterr() == ("", "")
