"""``llama-onnx perplexity``: which kept results count, and how the folder is opened."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli.main import main
from bench.gate import word_perplexity
from export.manifest import MANIFEST_NAME

Score = Callable[..., dict[str, Any]]


@pytest.fixture
def score(
    tiny_dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Score:
    """The document of one document's word perplexity; results are kept for this test only."""
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))

    def get(folder: Path, *more: str) -> dict[str, Any]:
        common = ["--dataset", str(tiny_dataset_file), "--limit", "1", "--threads", "1", "--json"]
        assert main(["perplexity", str(folder), *common, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return get


def test_third_party_folders_of_equal_names_share_nothing(
    exports: Callable[..., Path], score: Score, tmp_path: Path
) -> None:
    folders = [shutil.copytree(exports(seed=k), tmp_path / f"{k}") for k in (0, 1)]
    for folder in folders:
        (folder / MANIFEST_NAME).unlink()
    one, other = (score(f)["candidate"]["word_perplexity"] for f in folders)
    assert one == score(exports(seed=0))["candidate"]["word_perplexity"]
    assert one != other


@pytest.mark.parametrize("option", ["--window=0", "--limit=-1", "--limit=0", "--workers=0", "--window=x"])
def test_numbers_that_make_no_sense(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["perplexity", str(tmp_path), option])
    assert ended.value.code == 2
    assert "is not a whole number of 1 or more" in capsys.readouterr().err


def test_a_language_without_blanks(
    exports: Callable[..., Path],
    score: Score,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole document is one word: its perplexity is beyond a float, that of the bytes is not."""
    monkeypatch.setattr(word_perplexity, "window_nats", lambda *_: 800.0)
    path = tmp_path / "zh.jsonl"
    path.write_text(json.dumps({"task": "perplexity", "text": 155 * "\u732b"}))
    found = score(exports(), "--dataset", str(path))["candidate"]
    assert (found["words"], found["word_perplexity"]) == (1, math.inf)
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    assert main(["perplexity", str(exports()), "--dataset", str(path)]) == 0
    assert "word perplexity infinite" in capsys.readouterr().out


def test_a_provider_that_falls_back(exports: Callable[..., Path], score: Score) -> None:
    found = score(exports(), "--provider", "cuda", "--allow-fallback")
    assert found["candidate"]["documents"] == 1
    assert found["session"]["provider"] == "cpu"
    assert "cuda" in found["session"]["fallback"]
