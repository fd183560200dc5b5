"""What is told in a line with an exit code, and what is a defect of ours."""

from __future__ import annotations

import sqlite3

import pytest

from bench.errors import DatasetError, run_child, user_error
from export.errors import GraphCheckError
from export.manifest import ManifestError
from reports.case_files import StorageError
from reports.errors import RecordError
from runtime.errors import ProviderUnavailableError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DatasetError("no text"), ("no text", 2)),
        (ManifestError("no folder"), ("no folder", 2)),
        (GraphCheckError("not fused"), ("not fused", 1)),
        (ProviderUnavailableError("no GPU"), ("no GPU", 4)),
        (RecordError("no record"), ("no record", 2)),
        (StorageError("disk full"), ("disk full", 4)),
        (
            sqlite3.OperationalError("locked"),
            ("the history database cannot be used (locked); set LLAMA_ONNX_HISTORY to another file", 2),
        ),
        (MemoryError("7 GB"), ("out of memory (7 GB); take a machine with more, or a smaller model or batch", 4)),
        (ZeroDivisionError("x"), None),
        (RuntimeError("x"), None),
    ],
)
def test_what_an_error_says(error: Exception, told: tuple[str, int] | None) -> None:
    assert user_error(error) == told


def test_a_child_tells_its_parent_in_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ProviderUnavailableError("no GPU")

    assert run_child(refuse) == 4
    assert capsys.readouterr().err == "error: no GPU\n"
    assert run_child(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_child(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
