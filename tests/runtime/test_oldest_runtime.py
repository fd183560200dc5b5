"""A folder is not opened under an ONNX Runtime older than its manifest demands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.manifest import ManifestError, read_manifest
from runtime import ort_session
from runtime.errors import SessionError
from runtime.loading import load, read_folder

Exports = Callable[..., Path]


@pytest.fixture
def folder(exports: Exports) -> Path:
    """Demands 1.23.0."""
    return exports("int4", {"method": "rtn"})


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(ort_session.ort, "__version__", version)


@pytest.mark.parametrize("version", ["1.22.1", "1.9.0", "1.23.0.dev20250801"])
def test_an_older_one_is_refused(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, version)
    with pytest.raises(SessionError) as refused:
        load(folder, threads=1)
    said = str(refused.value)
    assert said.startswith(f"onnxruntime {version} is too old for {folder}, which needs 1.23.0 or newer: MatMulNBits ")
    assert "(lm_head.MatMulNBits)" in said
    assert "install onnxruntime>=1.23.0" in said
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("version", ["1.23.0", "1.100.0", "1.33.0.dev20261101"])
def test_the_same_and_newer_ones_are_not(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, version)
    load(folder, threads=1).close()


def test_what_really_happens_can_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "1.22.1")
    with load(folder, threads=1, any_runtime=True) as session:
        assert session.prefill([[7, 19]]).shape == (1, 331)


def test_nothing_is_opened_before_the_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "ort", SimpleNamespace(__version__="1.22.1"))  # anything else is an AttributeError
    with pytest.raises(SessionError, match="too old"):
        load(folder, threads=1)


def test_a_manifest_from_before_opens(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    raw = json.loads((old / "manifest.json").read_text())
    del raw["oldest_runtime"], raw["oldest_because"]
    (old / "manifest.json").write_text(json.dumps(raw))
    assert read_manifest(old).oldest_runtime == ""
    pretend(monkeypatch, "1.22.1")
    load(old, threads=1).close()
    (old / "manifest.json").write_text(json.dumps(raw | {"oldest_runtime": "newest"}))
    with pytest.raises(ManifestError, match=r"'newest' is no version"):
        read_manifest(old)


def test_a_third_party_folder_is_judged_by_its_graph(folder: Path, tmp_path: Path) -> None:
    unsigned = shutil.copytree(folder, tmp_path / "unsigned")
    (unsigned / "manifest.json").unlink()
    found, told = read_folder(unsigned), read_manifest(folder)
    assert (found.oldest_runtime, found.oldest_because) == (told.oldest_runtime, told.oldest_because)
