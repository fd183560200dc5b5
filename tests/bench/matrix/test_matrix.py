"""``llama-onnx matrix`` for real: a row a runtime, with environments that compute wrongly, crash and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli.main import main
from bench.matrix.rows import PLAN, Side
from bench.runtimes.environments import Runtime
from reports.matrix import Matrix
from tests.bench.matrix.faults import faulty_environment

CRASH = """
import os, signal, onnxruntime
real = onnxruntime.InferenceSession.run_with_iobinding
onnxruntime.InferenceSession.run_with_iobinding = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)
"""
REFUSE = """
import sys, onnxruntime
def refuse(path, *_, **__):
    print(f"2026-11-28 10:00:00.1 [W:onnxruntime:, x.cc:1 F] {path} is strange", file=sys.stderr, flush=True)
    raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 11, max supported: 10")
onnxruntime.InferenceSession = refuse
"""
WARN = """
import sys, onnxruntime
real = onnxruntime.InferenceSession
def opened(path, *a, **k):
    print(f"2026-11-28 10:00:00.1 [W:onnxruntime:, x.cc:1 F] {path} is slow", file=sys.stderr, flush=True)
    return real(path, *a, **k)
onnxruntime.InferenceSession = opened
"""
REFUSE_MEASURED = """
import sys, onnxruntime
def refuse(*_, **__):
    raise RuntimeError("no such kernel")
if "measure_case.py" in " ".join(sys.orig_argv):
    onnxruntime.InferenceSession = refuse
"""


def environment(folder: Path, code: str) -> Path:
    """A virtual environment with the packages of this one, and code that runs when its Python starts."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "sitecustomize.py").write_text(code)
    return folder


@pytest.fixture
def matrix(
    exports: Callable[..., Path],
    checkpoints: Callable[..., Path],
    tiny_dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, Matrix]]:
    """``matrix(*options, runtimes=...)`` over the tiny model: exit code and document."""
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA_ONNX_LOCK", str(tmp_path / "lock"))

    def run(*options: str, out: str = "out", **changes: Any) -> tuple[int, Matrix]:
        command = ["matrix", str(exports(**changes)), "--baseline", str(checkpoints()), "--mode", "quick"]
        command += ["--dataset", str(tiny_dataset_file), "--threads", "1", "--out", str(tmp_path / out), *options]
        code = main(command)
        return code, Matrix.read(tmp_path / out / "matrix.json")

    return run


def test_wrong_crashed_and_refusing_runtimes_are_rows(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = faulty_environment(tmp_path / "wrong", "rotary position off by one").parents[1]
    crash, refuse = environment(tmp_path / "crash", CRASH), environment(tmp_path / "refuse", REFUSE)
    warn = environment(tmp_path / "warn", WARN)
    asked = ",".join(f"venv={v}" for v in (wrong, crash, refuse, warn))
    code, made = matrix("--runtime", asked, "--pairs", "0")
    rows = {r.text: r for r in made.rows}
    assert code == made.exit_code == 1
    assert rows["venv=warn"].verdict == "PASS"
    assert rows["venv=warn"].warnings[0] == "model.onnx is slow"
    reference = next(r for r in made.rows if r.reference)
    assert (reference.verdict, reference.outcome, reference.warnings) == ("PASS", "ran", [])
    assert [c.kind for c in reference.results if c.kind == "exact"] == []
    assert all(r.load_s for r in (reference, rows["venv=warn"]))
    assert rows["venv=crash"].outcome == "crashed"
    assert "signal 11" in rows["venv=crash"].reason
    assert rows["venv=refuse"].outcome == "refused"
    assert "Unsupported model IR version" in rows["venv=refuse"].reason
    assert rows["venv=refuse"].warnings == ["model.onnx is strange"]
    found = rows["venv=wrong"]
    assert (found.outcome, found.parity) == ("ran", "FAIL")
    assert found.first_failed is not None
    assert found.difference is not None
    assert (found.difference.layer, found.difference.operator) == (1, "GroupQueryAttention")
    script = tmp_path / "out" / found.difference.reproduction
    assert script.stat().st_size == found.difference.reproduction_bytes < 1_000_000
    assert subprocess.run([str(wrong / "bin" / "python"), str(script)], capture_output=True).returncode == 1
    assert subprocess.run([sys.executable, str(script)], capture_output=True).returncode == 0
    assert (tmp_path / "out" / found.page).is_file()
    assert str(tmp_path) not in made.model_dump_json(exclude={"command"})
    assert "venv wrong" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.matrix import rows

    warn = environment(tmp_path / "warn", WARN)
    options = ("--runtime", f"venv={warn}", "--pairs", "0")
    code, first = matrix(*options)
    assert code == 0
    before = {r.name: r.seconds for r in first.rows}
    monkeypatch.setattr(rows.Rows, "_measure", lambda *_: pytest.fail("measured again"))
    code, again = matrix(*options, "--resume")
    assert {r.name: r.seconds for r in again.rows} == before
    assert main(["matrix", "x", "--baseline", "y", *options]) == 2
    with pytest.raises(AssertionError):  # without --resume nothing is overwritten
        assert matrix(*options)[0] == 0
    for changed in (("--mode", "standard"), ("--limit", "800")):
        assert matrix(*options, *changed, "--resume")[0] == 2


def test_a_row_that_was_refused_is_not_measured_again(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.matrix import rows

    refuse = environment(tmp_path / "refuse", REFUSE)
    options = ("--runtime", f"venv={refuse}", "--cases", "b1-p8-n4")  # with speed, which such a row has not
    code, first = matrix(*options)
    assert code == 1
    monkeypatch.setattr(rows.Rows, "_measure", lambda *_: pytest.fail("measured again"))
    assert matrix(*options, "--resume")[1].rows == first.rows


def test_a_runtime_that_refuses_while_it_is_measured_is_a_row(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path
) -> None:
    refuse = environment(tmp_path / "refuse", REFUSE_MEASURED)
    code, made = matrix("--runtime", f"venv={refuse}", "--cases", "b1-p8-n4")
    row = next(r for r in made.rows if not r.reference)
    assert code == 1
    assert (row.parity, row.outcome, row.verdict) == ("PASS", "refused", "FAIL")
    assert "no such kernel" in row.reason


def test_speed_is_compared_in_pairs(matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path) -> None:
    slow = environment(
        tmp_path / "slow",
        "import time, onnxruntime\nreal = onnxruntime.InferenceSession.run_with_iobinding\n"
        "def run(*a):\n    time.sleep(0.05)\n    return real(*a)\n"
        "onnxruntime.InferenceSession.run_with_iobinding = run\n",
    )
    code, made = matrix(
        "--runtime", f"venv={slow}", "--cases", "b1-p8-n4", "--rounds", "2", "--max-others", "1", "--max-steal", "1"
    )
    row = next(r for r in made.rows if not r.reference)
    assert code == 1
    assert (row.parity, row.verdict) == ("PASS", "FAIL")
    assert {r.metric: r.status for r in row.speed if r.gating} == {"ttft": "REGRESSION", "tpot": "REGRESSION"}
    assert row.load_s is not None
    assert row.peak_memory_bytes is not None
    assert row.peak_memory_bytes > 1e7


def test_a_provider_that_is_not_here_leaves_the_row_open(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path
) -> None:
    warn = environment(tmp_path / "warn", WARN)
    code, made = matrix("--runtime", f"venv={warn}", "--pairs", "0", "--provider", "cpu,cuda", precision="fp16")
    assert code == 3
    assert {r.outcome for r in made.rows if r.provider == "cuda"} == {"unavailable"}


def test_environments_of_one_name_have_rows_of_their_own() -> None:
    here = Runtime("onnxruntime", "1.32.0", sys.prefix)
    runtimes = [here, Runtime("onnxruntime", "1.32.0"), Runtime(venv="/a/.venv"), Runtime(venv="/b/a/.venv")]
    runtimes.append(Runtime(venv="/a/.venv", version="1.32.0"))  # another version was installed into it
    slugs = [Side(r, "cpu").slug for r in runtimes]
    assert len(set(slugs)) == 5
    assert slugs[1] == "onnxruntime-1.32.0-cpu"
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for s in slugs)


def test_the_same_version_in_two_environments_has_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from bench.cli.matrix import runtimes_of
    from bench.runtimes import environments

    monkeypatch.setattr(environments, "prepare", lambda runtime, _say: runtime)
    own = environments.here()

    def names(*asked: str) -> list[str]:
        reference, others = runtimes_of(SimpleNamespace(runtime=list(asked), bisect=None, reference=None))  # type: ignore[arg-type]
        return [r.label for r in (reference, *others)]

    assert names("1.27.0") == [f"{own.distribution} {own.version}", "onnxruntime 1.27.0"]
    assert names(f"{own.distribution}=={own.version}") == [
        f"{own.distribution} {own.version} (reference)",
        f"{own.distribution} {own.version}",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "give either --runtime"),
        (("--runtime", "1.27", "--bisect", "1.27..1.28"), "give either --runtime"),
        (("--runtime", "1.27", "--pairs", "3"), "decides nothing"),
        (("--runtime", "1.27", "--provider", "gpu"), "unknown provider 'gpu'"),
        (("--bisect", "1.27..1.28", "--provider", "cpu,cuda"), "one provider"),
        (("--bisect", "1.27..1.28", "--reference", "1.26"), "leave --reference out"),
        (("--runtime", "1.27", "--reference", "1.26,1.25"), "names several"),
        (("--runtime", "venv=/nowhere"), "no virtual environment at"),
        (("--runtime", "9.9.9", "--out", __file__), "is a file"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    options: tuple[str, ...], told: str, exports: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["matrix", str(exports()), "--baseline", "nothing", *options]) == 2
    assert told in capsys.readouterr().err


def test_what_needs_no_environment_is_refused_before_one_is_made(
    exports: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--baseline", "demo", "--runtime", "venv=/nowhere", "--out", str(tmp_path)]
    assert main(["matrix", str(tmp_path / "none"), *options]) == 2
    assert "no exported folder at" in capsys.readouterr().err
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / PLAN).touch()
    assert main(["matrix", str(exports()), *options]) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_a_case_that_the_folder_cannot_hold_is_refused(
    exports: Callable[..., Path],
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLAMA_ONNX_LOCK", str(tmp_path / "lock"))
    warn = environment(tmp_path / "warn", WARN)
    command = ["matrix", str(exports()), "--baseline", str(checkpoints()), "--runtime", f"venv={warn}"]
    assert main([*command, "--cases", "b1-p100000-n2", "--out", str(tmp_path / "out")]) == 2
    assert "--cases b1-p100000-n2 is longer than the" in capsys.readouterr().err


def test_json_is_one_document(
    matrix: Callable[..., tuple[int, Matrix]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn = environment(tmp_path / "warn", WARN)
    matrix("--runtime", f"venv={warn}", "--pairs", "0", "--json")
    assert json.loads(capsys.readouterr().out)["kind"] == "matrix"
