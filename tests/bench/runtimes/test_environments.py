"""ONNX Runtimes by version: what names them, where they lie, what is said when one cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from bench.cli.main import main
from bench.errors import BenchError
from bench.runtimes import environments
from bench.runtimes.environments import Runtime, here, parse_runtimes, prepare, released


def test_a_list_of_versions_is_read_in_its_order() -> None:
    found = parse_runtimes("onnxruntime==1.23.2, 1.27,onnxruntime-gpu==1.31.1,1.32,venv=/a/b/.venv")
    assert [r.text for r in found] == [
        "onnxruntime==1.23.2",
        "onnxruntime==1.27.0",
        "onnxruntime-gpu==1.31.1",
        "onnxruntime-gpu==1.32.0",
        "venv=b/.venv",
    ]
    assert parse_runtimes("1.30")[0].text == "onnxruntime==1.30.0"
    assert parse_runtimes("1.33.0.dev20261101")[0].version == "1.33.0.dev20261101"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("onnxruntime", "names no version"),
        ("onnxruntime==latest", "names no version"),
        ("", "names no version"),
        ("torch==2.13.0", "neither onnxruntime nor onnxruntime-gpu"),
        ("1.27,1.27.0", "onnxruntime==1.27.0 twice"),
    ],
)
def test_what_names_no_runtime_is_refused(text: str, told: str) -> None:
    with pytest.raises(BenchError, match=told):
        parse_runtimes(text)


def test_this_environment_is_one_as_well() -> None:
    found = here()
    assert found.folder == Path(sys.prefix)
    assert found.label == f"{found.distribution} {found.version}"
    assert prepare(found) is found


def test_another_environment_tells_its_version_and_not_its_place(tmp_path: Path, environment: Path) -> None:
    made = prepare(Runtime(venv=str(environment)))
    assert made.version == here().version
    assert made.label == f"venv {environment.name} (onnxruntime {made.version})"
    with pytest.raises(BenchError, match="no virtual environment at"):
        prepare(Runtime(venv=str(tmp_path / "none")))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(BenchError, match="cannot be imported: ModuleNotFoundError"):
        prepare(Runtime(venv=str(tmp_path / "bare")))


def test_an_environment_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))

    def failing(command: list[str], **_: Any) -> Any:
        said = "WARNING: x\nERROR: Could not find a version that satisfies onnxruntime==9.9.9 (from versions: 1.20.0)\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(environments.subprocess, "run", failing)
    with pytest.raises(BenchError, match=r"onnxruntime==9\.9\.9 cannot be installed: Could not find a version"):
        prepare(*parse_runtimes("9.9.9"))
    assert not list((tmp_path / "runtimes").iterdir())


def test_what_is_here_installs_and_asks_the_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "version", lambda _: "26.0")
    assert environments._pip("ask") == [sys.executable, "-m", "pip"]

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environments, "version", missing)
    monkeypatch.setattr(environments.shutil, "which", lambda name: f"/bin/{name}")
    assert environments._pip("ask") == ["/bin/uv", "tool", "run", "--python", sys.executable, "pip"]
    monkeypatch.setattr(environments.shutil, "which", lambda _: None)
    with pytest.raises(BenchError, match="neither pip nor uv is here to ask for the versions of onnxruntime"):
        released("onnxruntime", Version("1.26.1"), Version("1.28.0"))
    with pytest.raises(BenchError, match=r"neither pip nor uv is here to install onnxruntime==1\.27\.0"):
        environments._install(Runtime("onnxruntime", "1.27.0"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_versions_between_two_are_those_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "onnxruntime (1.32.0)\nAvailable versions: 1.32.0, 1.28.0, 1.27.0, 1.26.1, 1.26.0\n  INSTALLED: 1.32.0\n"
    monkeypatch.setattr(
        environments.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 0, listed, "WARNING")
    )
    found = released("onnxruntime", Version("1.26.1"), Version("1.28.0"))
    assert [r.version for r in found] == ["1.26.1", "1.27.0", "1.28.0"]
    monkeypatch.setattr(
        environments.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 1, "", "ERROR: no index")
    )
    with pytest.raises(BenchError, match="does not tell the versions of onnxruntime: ERROR: no index"):
        released("onnxruntime", Version("1.26.1"), Version("1.28.0"))


def test_an_environment_whose_python_is_gone_says_how_to_remove_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    (asked,) = parse_runtimes("1.27")
    asked.folder.mkdir(parents=True)
    (asked.folder / environments.FACTS).write_text("{}")
    with pytest.raises(BenchError, match=r"the Python of its environment is gone; remove it with: rm -r"):
        prepare(asked)


@pytest.mark.slow
def test_a_version_is_installed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    said: list[str] = []
    made = prepare(*parse_runtimes("onnxruntime==1.27.0"), say=said.append)
    names = {p.name.partition("-")[0] for p in made.folder.glob("lib/python3*/site-packages/*.dist-info")}
    assert names == {"numpy", "onnxruntime"}
    assert f"rm -r '{made.folder}'" in said[-1]
    assert " MB in " in said[-1]
    assert prepare(made, say=said.append) == made
    assert len(said) == 2


def test_doctor_says_what_the_environments_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    made = tmp_path / "runtimes" / "onnxruntime-1.27.0-cp311"
    made.mkdir(parents=True)
    (made / "library.so").write_bytes(bytes(200_000_000 - 2))
    (made / "runtime.json").write_text("{}")
    (tmp_path / "runtimes" / ".half-made").mkdir()
    assert main(["doctor", "--no-bandwidth", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["environments"]
    assert told == {"count": 1, "bytes": 200_000_000, "folder": str(tmp_path / "runtimes")}
    assert main(["doctor", "--no-bandwidth"]) == 0
    assert "1 for --runtime, 0.2 GB in" in " ".join(capsys.readouterr().out.split())
