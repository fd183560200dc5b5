"""One measurement at a time; sweep files whose errors name their line; the history's commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cli.main import main
from bench.conftest import refuse_workers
from bench.latency import sweep_measure
from bench.latency.sweep import Sweep, SweepError, merge, parse_sweep
from bench.latency.sweep_measure import processes
from bench.machine.lock import BusyError, machine_lock
from reports.comparison import CaseRecord
from reports.store import Store
from runtime.providers import PROVIDERS
from tests.reports.comparison_examples import example_comparison

Paths = Callable[..., Path]
HOLD = """
import sys
from bench.machine.lock import machine_lock
with machine_lock("the other"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process that holds the machine until its input ends."""
    monkeypatch.setenv("LLAMA_ONNX_LOCK", str(tmp_path / "machine.lock"))
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def test_two_at_once_are_refused_and_freed_by_a_kill(other):
    with pytest.raises(BusyError, match=rf"the other \(process {other.pid}\) measures") as caught, machine_lock("me"):
        pass
    assert caught.value.exit_code == 4
    other.kill()
    other.wait()
    with machine_lock("me"):
        pass


def test_waiting_serialises(other):
    said: list[str] = []

    def end(message: str) -> None:
        said.append(message)
        other.stdin.close()

    with machine_lock("me", wait_s=60, status=end):
        assert other.wait(timeout=60) == 0
    assert said == [f"waiting: the other (process {other.pid}) measures on this machine"]


def test_the_suite_is_refused_while_another_measures(other, checkpoints: Paths, exports: Paths, tmp_path: Path):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "pytest", "bench/", "--profile", "smoke", "--model", str(checkpoints())]
    command += ["--exported", str(exports()), "--report-dir", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "two at once would measure each other" in done.stdout + done.stderr


def test_workers_are_refused():
    refuse_workers(SimpleNamespace(option=SimpleNamespace()))  # type: ignore[arg-type]
    refuse_workers(SimpleNamespace(option=SimpleNamespace(numprocesses=None)))  # type: ignore[arg-type]
    for config in (
        SimpleNamespace(option=SimpleNamespace(numprocesses=2)),
        SimpleNamespace(option=SimpleNamespace(), workerinput={}),
    ):
        with pytest.raises(pytest.UsageError, match="leave -n out"):
            refuse_workers(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("models: [demo]\nbatch_sizes:\n  - 1\n  - zero\n", "line 4, column 5", "'zero' is not of type 'integer'"),
        ("models: [demo]\nprecisions: [fp32, fp8]\n", "line 2, column 20", "'fp8' is not one of"),
        ("models: [demo]\n\ncolour: red\n", "line 3, column 1", "'colour' was unexpected"),
        ("batch_sizes: [1]\n", "line 1, column 1", "'models' is a required property"),
        ("models: [demo\nrounds: 3\n", "line 2", "expected"),
        ("models: [demo]\nrounds: 3\nrounds: 4\n", "line 3", "rounds stands twice"),
        ("- demo\n", "line 1", "is not of type 'object'"),
        ("", "s.yaml is empty", "models: [demo]"),
    ],
)
def test_a_sweep_error_names_its_line(text: str, place: str, words: str):
    with pytest.raises(SweepError) as caught:
        parse_sweep(text, "s.yaml")
    assert place in str(caught.value)
    assert words in str(caught.value)


def test_a_sweep_takes_every_provider():
    assert parse_sweep(f"models: [demo]\nproviders: [{', '.join(PROVIDERS)}]", "s.yaml").providers == tuple(PROVIDERS)


def test_sweep_measures_resumes_and_merges(exports: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "s.yaml"
    file.write_text(
        f"models: ['{exports()}']\nbatch_sizes: [1, 2]\nprompt_lengths: [8]\n"
        "new_tokens: 4\nrounds: 2\nprocesses: 1\nthreads: 1\n"
    )
    out = tmp_path / "out"
    assert main(["sweep", str(file), "--out", str(out), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["parameters"]["batch"] for r in records] == [1, 2]
    kept = (out / "cases.jsonl").read_bytes()
    assert main(["sweep", str(file), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere.jsonl"
    moved = [{**r, "fingerprint": "elsewhere"} for r in records]
    elsewhere.write_text("".join(json.dumps(r) + "\n" for r in [*moved, *records]))
    assert main(["sweep", str(file), "--out", str(out), "--resume", "--merge", str(elsewhere)]) == 0
    assert (out / "cases.jsonl").read_bytes() == kept  # nothing was measured again
    merged = [json.loads(line) for line in (out / "merged.jsonl").read_text().splitlines()]
    assert len(merged) == 4
    assert len({r["fingerprint"] for r in merged}) == 2


SMALL = "prompt_lengths: [8]\nnew_tokens: 4\nrounds: 2\nprocesses: 1\nthreads: 1\n"


def test_an_exported_folder_has_the_precision_of_its_manifest(
    exports: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "s.yaml"
    file.write_text(f"models: ['{exports()}']\nprecisions: [bf16, fp32]\n{SMALL}")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    (record,) = json.loads(said.out)
    assert record["parameters"]["precision"] == "fp32"
    assert " fp32 cpu " in record["case"]
    assert "is exported in fp32 and is measured in that alone" in said.err


def test_a_third_party_export_is_measured_as_it_is(exports: Paths, tmp_path: Path):
    folder = tmp_path / "bare"
    shutil.copytree(exports("fp16"), folder)
    (folder / "manifest.json").unlink()
    points = [p.precision for p in processes(Sweep(models=(str(folder), "demo"), precisions=("fp32", "bf16")))]
    assert points == 3 * ["fp16", "fp32", "bf16"]


def test_every_model_is_looked_at_before_the_first_is_measured(
    exports: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(f"models: ['{exports()}', './no-such-model']\n{SMALL}")
    assert main(["sweep", str(file), "--out", str(out)]) == 2
    assert "no such model" in capsys.readouterr().err
    assert not (out / "cases.jsonl").exists()


def test_what_was_measured_is_shown_whatever_ends_a_sweep(
    exports: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real, calls = sweep_measure.measure_process, []

    def stopped(*what: Any) -> Any:
        calls.append(what)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*what)

    monkeypatch.setattr(sweep_measure, "measure_process", stopped)
    file = tmp_path / "s.yaml"
    file.write_text(f"models: ['{exports()}']\nbatch_sizes: [1, 2]\n{SMALL}")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 130
    told = capsys.readouterr().out
    assert "Medians over processes" in told
    assert " of 1 " in told  # undisturbed, as far as the machine is quiet


def test_merge_keeps_machines_apart():
    one = CaseRecord(schema_version=1, case="x", metrics={"t": [1.0]}, fingerprint="a")
    two = one.model_copy(update={"fingerprint": "b"})
    assert merge([[one, two], [one]]) == [one, two]


def test_history_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from bench.machine.environment import machine

    monkeypatch.setenv("LLAMA_ONNX_HISTORY", str(tmp_path / "h.sqlite"))
    made = example_comparison()
    path = tmp_path / "comparison.json"
    path.write_text(made.to_json())
    assert main(["history", "list"]) == 0
    assert "history add" in capsys.readouterr().out
    assert main(["history", "add", str(path), "--label", "abc"]) == 0
    assert "15 of 15 points were new" in capsys.readouterr().out.replace("\n", " ")
    assert main(["history", "check"]) == 2  # the example's machine is not this one
    assert "--any-machine" in capsys.readouterr().err
    assert main(["history", "export"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(lines) == 15
    here = machine().fingerprint
    one = next(x for x in lines if x["metric"] == "tpot") | {"fingerprint": here}
    past = [
        one | {"run": f"n{k}", "at_utc": f"2026-10-{k + 1:02d}", "value": (1.0 if k < 16 else 1.1) + k % 3 / 1000}
        for k in range(20)
    ]
    (tmp_path / "past.jsonl").write_text("".join(json.dumps(x) + "\n" for x in past))
    assert main(["history", "import", str(tmp_path / "past.jsonl")]) == 0
    capsys.readouterr()
    assert main(["history", "check"]) == 3
    assert "stepped by +10" in capsys.readouterr().out
    with Store(tmp_path / "h.sqlite") as store:
        assert len(store.points(here)) == 20


def test_compare_refuses_half_a_question(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["compare", "--base", str(tmp_path)]) == 2
    assert "give either" in capsys.readouterr().err
    sides = ["--base", str(tmp_path), "--candidate", str(tmp_path)]
    assert main(["compare", *sides, "--pairs", "3"]) == 2
    assert "5 or more" in capsys.readouterr().err
    assert main(["compare", *sides, "--margin", "tpot=3"]) == 2
    assert "is not a share" in capsys.readouterr().err
    assert main(["compare", *sides, "--gate", "ttft,speed", "--out", str(tmp_path / "out")]) == 2
    assert "--gate speed is not measured here; choose from tpot, ttft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processes", "code", "status", "advisory"), [(5, 1, "REGRESSION", False), (4, 3, "INCONCLUSIVE", True)]
)
def test_compare_takes_files(
    processes: int, code: int, status: str, advisory: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Five processes a side fail a pipeline, fewer are advice."""
    for name, level in (("a", 1.0), ("b", 1.2)):
        lines = [
            {"schema_version": 1, "case": "x", "metrics": {"time": [level + k / 500, level - k / 500]}}
            for k in range(processes)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    arguments = ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == code
    made = json.loads(capsys.readouterr().out)
    assert made["results"][0]["status"] == status
    assert made["advisory"] == advisory
    assert [made[side]["label"] for side in ("base", "candidate")] == ["a.jsonl", "b.jsonl"]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"index.html", "report.md", "comparison.json", "junit.xml"}
    assert made["command"][:2] == ["llama-onnx", "compare"]
