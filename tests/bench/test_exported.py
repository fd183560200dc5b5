"""What is kept in the cache is this exporter's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import exported
from export import pipeline
from export.source import resolve


def test_an_export_of_another_revision_is_not_taken(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(exported, "export_model", lambda _spec, path, **_: made.append(path))
    source = resolve(str(checkpoints()))

    def folder() -> Path:
        return exported.exported_folder(source, str(checkpoints()), "fp32", "cpu", "ort")

    assert folder() == folder()
    package = shutil.copytree(Path(pipeline.__file__).parent, tmp_path / "export")
    assert exported.exporter_digest(package) == exported.exporter_digest()
    with (package / "fused.py").open("a") as f:
        f.write("# another revision\n")
    exported.exporter_digest.cache_clear()
    other = exported.exporter_digest(package)
    monkeypatch.setattr(exported, "exporter_digest", lambda: other)
    assert folder() not in made[:2]
