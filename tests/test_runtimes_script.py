"""docs/ci/runtimes.sh: the folder goes through the matrix where a lock file moves onnxruntime, and nowhere else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "ci" / "runtimes.sh"
FAKE = '#!/usr/bin/env bash\necho "$@" > calls.txt\nexit 3\n'
UV = '[[package]]\nname = "onnx"\nversion = "1.21.0"\n\n[[package]]\nname = "{}"\nversion = "{}"\nsource = "x"\n'


def run(tmp_path: Path, before: str, now: str) -> tuple[subprocess.CompletedProcess[str], str]:
    fake = tmp_path / "llama-onnx"
    fake.write_text(FAKE, encoding="utf-8")
    fake.chmod(0o755)
    for name, text in (("before", before), ("now", now)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "EXPORT": "folder", "MODEL": "demo"}
    done = subprocess.run(
        [str(SCRIPT), "before", "now"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    calls = tmp_path / "calls.txt"
    return done, calls.read_text(encoding="utf-8") if calls.exists() else ""


@pytest.mark.parametrize(
    ("before", "now", "versions"),
    [
        (
            "numpy==2.3.0\nonnxruntime==1.27.0 ; python_version >= '3.11'\n",
            "onnxruntime==1.32.0\n",
            "--reference onnxruntime==1.27.0 --runtime onnxruntime==1.32.0",
        ),
        (
            UV.format("onnxruntime-gpu", "1.27.0"),
            UV.format("onnxruntime-gpu", "1.31.1"),
            "--reference onnxruntime-gpu==1.27.0 --runtime onnxruntime-gpu==1.31.1",
        ),
        (
            "onnxruntime-gpu[cuda,cudnn]==1.30.0\n",
            "onnxruntime-gpu[cuda,cudnn] == 1.31.1\n",
            "--reference onnxruntime-gpu==1.30.0 --runtime onnxruntime-gpu==1.31.1",
        ),
    ],
)
def test_both_versions_are_compared(tmp_path: Path, before: str, now: str, versions: str) -> None:
    done, call = run(tmp_path, before, now)
    assert done.returncode == 3
    assert call.startswith("matrix folder --baseline demo ")
    assert versions in call


def test_an_unchanged_version_runs_nothing(tmp_path: Path) -> None:
    done, call = run(tmp_path, "onnxruntime==1.32.0\n", UV.format("onnxruntime", "1.32.0"))
    assert (done.returncode, call) == (0, "")
    assert "nothing to look at" in done.stdout


def test_a_lock_file_without_it_is_wrong_input(tmp_path: Path) -> None:
    done, call = run(tmp_path, "onnxruntime==1.32.0\n", "onnx==1.21.0\nonnxruntime-genai==0.18.0\n")
    assert (done.returncode, call) == (2, "")
    assert "pins neither" in done.stderr
