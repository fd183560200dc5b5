"""Measuring in pairs: what is run in which order, what is repeated, and that a killed run goes on where it was.

The processes here are a stand-in that prints a result at once; one test runs the real child on a tiny export.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench.cli.compare import command_of, turns_of
from bench.cli.main import main
from bench.errors import BenchError
from bench.latency import paired_run
from bench.latency.paired_run import PairedRun, Plan, case_key, learned, parse_case
from bench.latency.sides import SideSpec, parse_side, suite_root
from bench.machine import state as machine_state
from bench.machine.state import Limits, disturbance, sample
from bench.process.child import Ended, run_child
from reports.case_files import StorageError, read_records, repair
from reports.compare import Rules
from reports.comparison import Comparison, GpuState
from reports.record import Case
from tests.bench.handicap import CHILD, Handicapped

Paths = Callable[..., Path]
RULES = Rules(planned=5, most=7)
CASES = (Case(batch=1, prompt=8, new_tokens=4), Case(batch=2, prompt=8, new_tokens=4))
OPEN = Limits(steal=1e9, others=1e9)  # ticks of 10 ms are many times a stub's duration


def plan(folder: Path, **changes: Any) -> Plan:
    sides = [SideSpec(name, str(folder), str(folder), threads=1) for name in ("base", "candidate")]
    made = Plan(base=sides[0], candidate=sides[1], cases=CASES, seed=1, rules=RULES, rounds=3, limits=OPEN)
    return replace(made, **changes)


class Stub:
    """In place of a child process; ``answers`` maps the number of a call to how it ended."""

    def __init__(self, answers: dict[int, Ended] | None = None, seconds: Callable[[int], float] = lambda _: 0.02):
        self.calls: list[dict[str, Any]] = []
        self.answers, self.seconds = answers or {}, seconds

    def __call__(self, command: list[str], env: dict[str, str], limit_s: float) -> Ended:
        self.calls.append(json.loads(command[-1]))
        n = len(self.calls) - 1
        found = {"metrics": {m: [self.seconds(n)] * 3 for m in ("ttft", "tpot")}, "versions": {"onnxruntime": "1"}}
        return self.answers.get(n, Ended("ok", "", 0, [], found))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(paired_run, "run_child", made)
    return made


def test_pairs_are_interleaved_and_ordered_by_the_seed(stub: Stub, tmp_path: Path):
    records = PairedRun(plan(tmp_path), tmp_path / "out").measure()
    assert len(records) == 2 * 2 * 5  # nothing to extend: no difference at all
    for case in map(case_key, CASES):
        own = [r for r in records if r.case == case]
        assert [r.pair for r in own] == [k // 2 for k in range(10)]
        assert all({own[k].side, own[k + 1].side} == {"base", "candidate"} for k in range(0, 10, 2))
        firsts = [own[k].side for k in range(0, 8, 2)]
        assert firsts[0] != firsts[1]
        assert firsts[2] != firsts[3]
        assert all(own[k].seed == own[k + 1].seed for k in range(0, 10, 2))
        assert len({r.seed for r in own}) == 5
    assert [r.sequence for r in records] == list(range(20))
    again = PairedRun(plan(tmp_path), tmp_path / "again").measure()
    assert [(r.case, r.side) for r in again] == [(r.case, r.side) for r in records]
    other = PairedRun(plan(tmp_path, seed=2), tmp_path / "other").measure()
    assert [(r.case, r.side) for r in other] != [(r.case, r.side) for r in records]


def test_an_undecided_case_is_extended_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stub = Stub(seconds=lambda n: 0.02 * (1 + 0.3 * (n * 7 % 5)))
    monkeypatch.setattr(paired_run, "run_child", stub)
    records = PairedRun(plan(tmp_path, cases=CASES[:1]), tmp_path / "out").measure()
    assert sorted({r.pair for r in records}) == list(range(7))


def test_a_disturbed_pair_is_repeated_as_a_whole_within_the_cap(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    reasons = iter(["", "steal 9 %", "", "", "", "", *["load"] * 40])
    stops: list[str] = []

    def stop(self: Any) -> Any:
        reason = next(reasons, "")
        stops.append(reason)
        return sample(), paired_run_disturbance(reason)

    from bench.machine.state import Disturbance

    def paired_run_disturbance(reason: str) -> Any:
        return Disturbance(0.0, 0.0, reason)

    monkeypatch.setattr(paired_run.Watch, "stop", stop)
    records = PairedRun(plan(tmp_path, cases=CASES[:1], repeats=1), tmp_path / "out").measure()
    first = [(r.attempt, r.outcome) for r in records if r.pair == 0]
    assert first == [(0, "ok"), (0, "invalid"), (1, "ok"), (1, "ok")]
    assert [(r.attempt, r.outcome) for r in records if r.pair == 1] == [(0, "ok"), (0, "ok")]
    last = [(r.attempt, r.outcome) for r in records if r.pair == 4]
    assert last == [(0, "invalid"), (0, "invalid"), (1, "invalid"), (1, "invalid")]


def test_a_failing_case_is_recorded_given_up_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Failing(Stub):
        def __call__(self, command: list[str], env: dict[str, str], limit_s: float) -> Ended:
            asked = json.loads(command[-1])
            ended = super().__call__(command, env, limit_s)
            if asked["batch"] == 2 and asked["options"] == {"bad": "1"}:
                return Ended("oom", "out of memory", 137, ["std::bad_alloc"], {})
            return ended

    monkeypatch.setattr(paired_run, "run_child", Failing())
    bad = replace(plan(tmp_path).candidate, options={"bad": "1"})
    records = PairedRun(plan(tmp_path, candidate=bad), tmp_path / "out").measure()
    failed = [r for r in records if r.outcome == "oom"]
    assert [(r.case, r.side, r.last_lines) for r in failed] == [("b2-p8-n4", "candidate", ["std::bad_alloc"])] * 2
    assert len([r for r in records if r.case == "b1-p8-n4"]) == 10
    from reports.compare import judge

    assert {r.case: r.status for r in judge(records, RULES).results} == {
        "b1-p8-n4": "EQUIVALENT",
        "b2-p8-n4": "MISSING",
    }


def test_wrong_input_at_the_start_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    refused = Ended("crash", "no such provider", 2, ["error: no such provider"], {}, refusal="no such provider")
    monkeypatch.setattr(paired_run, "run_child", Stub({0: refused}))
    with pytest.raises(BenchError, match="no such provider"):
        PairedRun(plan(tmp_path), tmp_path / "out").measure()


def test_resume_neither_loses_nor_repeats(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = PairedRun(plan(tmp_path), tmp_path / "whole").measure()

    class KilledError(Exception):
        pass

    def dies(command: list[str], env: dict[str, str], limit_s: float) -> Ended:
        if len(stub.calls) == 27:
            raise KilledError
        return stub(command, env, limit_s)

    monkeypatch.setattr(paired_run, "run_child", dies)
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        PairedRun(plan(tmp_path), out).measure()
    with (out / "cases.jsonl").open("ab") as f:
        f.write(b'{"schema_version":1,"case":"b1-p8')  # what a power cut leaves
    with pytest.raises(BenchError, match="--resume"):
        PairedRun(plan(tmp_path), out)
    with pytest.raises(BenchError, match="another plan"):
        PairedRun(plan(tmp_path, seed=9), out, resume=True)
    monkeypatch.setattr(paired_run, "run_child", stub)
    resumed = PairedRun(plan(tmp_path), out, resume=True).measure()
    keys = [(r.case, r.pair, r.attempt, r.side) for r in resumed]
    assert keys == [(r.case, r.pair, r.attempt, r.side) for r in whole]
    kept = read_records(out / "cases.jsonl")
    assert [(r.case, r.pair, r.attempt, r.side) for r in kept] == keys
    assert [r.sequence for r in kept] == list(range(len(keys)))
    assert len(stub.calls) == 20 + 20


def in_turn(stub: Stub, calls: list[list[str]]) -> Callable[..., dict[str, Ended]]:
    def made(commands: dict[str, tuple[list[str], dict[str, str]]], rounds: int, limit_s: float) -> dict[str, Ended]:
        calls.append(list(commands))
        return {name: replace(stub(*command, limit_s), seconds=1.0) for name, command in commands.items()}

    return made


def test_rounds_in_turn_make_both_records_of_a_pair_at_once(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[list[str]] = []
    monkeypatch.setattr(paired_run, "run_in_turn", in_turn(stub, calls))
    chosen = plan(tmp_path, turns="rounds", cases=CASES[:1])
    records = PairedRun(chosen, tmp_path / "out").measure()
    assert len(calls) == 5
    assert [r.side for r in records] == [name for call in calls for name in call]
    assert {tuple(call) for call in calls} == {("base", "candidate"), ("candidate", "base")}
    assert [r.position for r in records] == [0, 1] * 5
    assert [r.sequence for r in records] == list(range(10))
    assert all(r.in_turn and r.duration_s == 1.0 for r in records)
    assert all(c["in_turn"] for c in stub.calls)
    apart = PairedRun(plan(tmp_path, cases=CASES[:1]), tmp_path / "apart").measure()
    assert [r.side for r in apart] == [r.side for r in records]
    assert not any(r.in_turn for r in apart)
    assert len(calls) == 5


def test_records_of_other_files_are_refused(stub: Stub, exports: Paths, tmp_path: Path):
    side = tmp_path / "side"
    shutil.copytree(exports(), side)
    PairedRun(plan(side), tmp_path / "out").measure()
    shutil.copytree(exports(), side, dirs_exist_ok=True)  # the same export, made again
    PairedRun(plan(side), tmp_path / "out", resume=True)
    shutil.rmtree(side)
    shutil.copytree(exports(seed=1), side)  # another one under the same name
    with pytest.raises(BenchError, match=r"before the files of .*side changed; take another --out"):
        PairedRun(plan(side), tmp_path / "out", resume=True)
    with pytest.raises(BenchError, match="another plan"):
        PairedRun(plan(side, seed=2), tmp_path / "out", resume=True)


def test_records_of_other_third_party_files_are_refused(stub: Stub, tmp_path: Path):
    (side := tmp_path / "side").mkdir()
    (side / "model.onnx").write_bytes(b"1")
    PairedRun(plan(side), tmp_path / "out").measure()
    PairedRun(plan(side), tmp_path / "out", resume=True)
    (side / "model.onnx").write_bytes(b"22")
    with pytest.raises(BenchError, match=r"before the files of .*side changed"):
        PairedRun(plan(side), tmp_path / "out", resume=True)


def test_a_pair_of_which_one_line_was_torn_off_is_completed(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[list[str]] = []
    monkeypatch.setattr(paired_run, "run_in_turn", in_turn(stub, calls))
    out, chosen = tmp_path / "out", plan(tmp_path, turns="rounds", cases=CASES[:1])
    whole = PairedRun(chosen, out).measure()
    kept = (out / "cases.jsonl").read_bytes().splitlines(keepends=True)
    (out / "cases.jsonl").write_bytes(b"".join(kept[:7]) + kept[7][:40])
    resumed = PairedRun(chosen, out, resume=True).measure()
    assert [(r.pair, r.side) for r in resumed] == [(r.pair, r.side) for r in whole]
    assert [r.in_turn for r in resumed] == [True] * 7 + [None] + [True] * 2
    assert len(calls) == 5 + 1


@pytest.mark.parametrize(
    ("asked", "provider", "memory", "expected"),
    [
        ("auto", "cpu", 1 << 40, "rounds"),
        ("auto", "cuda", 1 << 40, "processes"),
        ("auto", "cpu", 1000, "processes"),
        ("rounds", "cuda", 1000, "rounds"),
        ("processes", "cpu", 1 << 40, "processes"),
    ],
)
def test_what_alternates(
    asked: str, provider: str, memory: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model.onnx").write_bytes(b"x" * 400)
    side = replace(plan(tmp_path).base, provider=provider)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    assert turns_of(asked, side, side) == expected


def stands(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def test_kill_9_in_the_middle_of_a_real_run(exports: Paths, tmp_path: Path):
    out = tmp_path / "out"
    arguments = [
        sys.executable,
        "-m",
        "bench.cli.main",
        "compare",
        "--base",
        str(exports()),
        "--candidate",
        str(exports()),
    ]
    arguments += ["--pairs", "5", "--cases", "b1-p8-n4", "--rounds", "1", "--out", str(out), "--json"]
    arguments += ["--max-steal", "9", "--max-others", "9", "--margin", "0.9"]
    root = Path(paired_run.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    first = subprocess.Popen(arguments, cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.poll() is None:
        if (out / "cases.jsonl").exists() and len((out / "cases.jsonl").read_bytes().splitlines()) >= 3:
            waiting = [p for p in psutil.Process(first.pid).children() if stands(p)]
            if waiting:
                break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    deadline = time.monotonic() + 20  # a process that waits its turn, stopped, must not outlive the run
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(exports()) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    before = (out / "cases.jsonl").read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 3 <= before.count(b"\n") < 10
    done = subprocess.run([*arguments, "--resume"], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1, 3), done.stderr
    assert (out / "cases.jsonl").read_bytes().startswith(before)
    made = json.loads(done.stdout)
    keys = [(r["case"], r["pair"], r["attempt"], r["side"]) for r in made["records"]]
    assert len(keys) == len(set(keys)) >= 10
    assert made["candidate"]["weights_sha256"]
    assert {r["metric"] for r in made["results"]} == {"ttft", "tpot", "total", "load", "peak_memory"}


@pytest.mark.parametrize(
    ("how", "outcome", "words"),
    [("crash", "crash", "about to die"), ("hang", "timeout", "hanging"), ("no_memory", "oom", "Failed to allocate")],
)
def test_what_goes_wrong_in_a_process_is_an_outcome(how: str, outcome: str, words: str, exports: Paths, tmp_path: Path):
    side = Handicapped(**vars(plan(exports()).candidate), handicap=how)
    asked = {**side.arguments(), **CASES[0].model_dump(), "rounds": 1}
    command = [side.python(), "-P", str(CHILD), json.dumps(asked)]
    ended = run_child(command, paired_run.environment(side), 8 if how == "hang" else 120)
    assert ended.outcome == outcome
    assert words in "\n".join(ended.last_lines)


def test_child_measures_and_the_side_learns_from_it(exports: Paths):
    side = plan(exports()).candidate
    asked = {
        **side.arguments(),
        **CASES[1].model_dump(),
        "rounds": 3,
        "options": {"session.intra_op.allow_spinning": "0"},
    }
    ended = run_child(
        [side.python(), "-P", str(paired_run.CHILD), json.dumps(asked)], paired_run.environment(side), 120
    )
    assert ended.outcome == "ok", ended.last_lines
    assert {m: len(v) for m, v in ended.found["metrics"].items()} == {
        "ttft": 3,
        "tpot": 3,
        "total": 3,
        "load": 1,
        "peak_memory": 1,
    }
    assert ended.found["details"]["option session.intra_op.allow_spinning"] == "0"
    assert ended.found["details"]["intra_op_threads"] == 1
    assert ended.found["model"]["weights_sha256"]


def test_learned_takes_facts_of_the_own_side(stub: Stub, tmp_path: Path):
    records = PairedRun(plan(tmp_path), tmp_path / "out").measure()
    assert learned(plan(tmp_path).candidate.described(), records).versions == {"onnxruntime": "1"}


def test_a_full_disk_leaves_the_file_as_it_was(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = PairedRun(plan(tmp_path), tmp_path / "out")
    records = run.measure()
    kept = run.log.file.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*--resume"):
        run.log.append(records[:1])
    assert run.log.file.read_bytes() == kept
    assert len(run.records) == kept.count(b"\n")


def test_repair_cuts_only_a_torn_line(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert repair(path)
    assert path.read_bytes() == b'{"a": 1}\n'
    assert not repair(path)


def test_sides_are_read_and_refused(tmp_path: Path):
    side = parse_side("base", f"{tmp_path},threads=2,option:session.x=1,provider=cpu")
    assert (side.threads, side.options, side.provider) == (2, {"session.x": "1"}, "cpu")
    assert "session.x=1" in side.described().label
    for text, words in (
        ("nowhere", "no folder at nowhere"),
        (f"{tmp_path},threads=no", "not a number of threads"),
        (f"{tmp_path},colour=red", "unknown key 'colour'"),
        (f"{tmp_path},venv={tmp_path}/none", "no virtual environment"),
        (f"{tmp_path},threads", "not KEY=VALUE"),
    ):
        with pytest.raises(BenchError, match=words):
            parse_side("base", text)
    with pytest.raises(BenchError, match="rev-parse"):
        suite_root(parse_side("base", f"{tmp_path},rev=no-such-revision"))


def test_another_environment_measures_its_side(exports: Paths, tmp_path: Path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/used\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    side = parse_side("candidate", f"{exports()},venv={tmp_path}/venv,threads=1")
    run = PairedRun(plan(exports(), candidate=side, cases=CASES[:1], rounds=1), tmp_path / "out")
    (record,) = run._measure(CASES[0], 0, 0, ["candidate"])
    assert record.outcome == "ok", record.last_lines
    assert (tmp_path / "used").read_text() == "-P\n"
    assert side.described().venv == f"{tmp_path.name}/venv"  # its place is in the command alone
    assert side.as_options()[2:4] == ["--runtime", f"venv={tmp_path}/venv"]  # parity is judged there as well


def test_a_candidate_that_is_another_model_fails_however_fast(
    checkpoints: Paths, exports: Paths, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = tmp_path / "data.jsonl"
    texts = [" ".join(words[(k * i) % 16] for i in range(150)) for k in range(1, 9)]
    data.write_text("\n".join(json.dumps({"task": "perplexity", "text": text}) for text in texts))
    arguments = ["compare", "--base", f"{exports()},threads=1", "--candidate", f"{exports(seed=1)},threads=1"]
    arguments += ["--model", str(checkpoints()), "--mode", "quick", "--dataset", str(data), "--pairs", "5"]
    arguments += ["--cases", "b1-p8-n4", "--rounds", "1", "--margin", "0.9", "--max-steal", "9", "--max-others", "9"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 1
    made = Comparison.model_validate_json(capsys.readouterr().out)
    assert made.validation is not None
    assert made.validation.verdict == "FAIL"
    assert made.verdict.reasons[0].startswith("parity")
    assert "REGRESSION" not in {r.status for r in made.results}
    assert "--seed" in made.command
    for name in ("index.html", "report.md", "comparison.json", "junit.xml"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        for part in made.command:  # the command to repeat it is the one place for paths
            text = text.replace(part, "")
        assert str(exports().parent) not in text, name
        assert str(tmp_path) not in text, name
    assert f"{exports().name}, cpu, 1 threads (weights {made.base.weights_sha256[:12]})" == made.base.title  # type: ignore[index]


def test_a_side_is_told_by_its_folders_name_and_the_command_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exports" / "small").mkdir(parents=True)
    (python := tmp_path / "old" / ".venv" / "bin" / "python").parent.mkdir(parents=True)
    python.touch()
    side = parse_side("base", f"{tmp_path}/exports/small,threads=2,venv={tmp_path}/old/.venv").described()
    assert (side.folder, side.venv) == ("small", "old/.venv")
    assert side.text == "small,threads=2,venv=old/.venv"
    assert str(tmp_path) not in side.model_dump_json()
    assert parse_side("base", ".").described().folder == tmp_path.name
    typed = ["compare", "--base", f"{tmp_path}/exports/small,venv={tmp_path}/old/.venv", "--out=/elsewhere/out"]
    args = argparse.Namespace(typed=[*typed, "--candidate", "exports/small"], seed=7)
    assert command_of(args) == [
        "llama-onnx",
        "compare",
        "--base",
        "exports/small,venv=old/.venv",
        "--out=/elsewhere/out",
        "--candidate",
        "exports/small",
        "--seed",
        "7",
    ]


def test_another_revision_is_a_worktree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    root = suite_root(parse_side("base", f"{tmp_path},rev=HEAD"))
    try:
        assert root.is_relative_to(tmp_path)
        assert (root / "runtime" / "session.py").is_file()
        assert suite_root(parse_side("base", f"{tmp_path},rev=HEAD")) == root
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=paired_run.CHILD.parent, check=True)


def test_cases_are_read_and_refused():
    assert case_key(parse_case("b4-p128-n32")) == "b4-p128-n32"
    for text in ("b0-p1-n2", "b1-p1-n1", "p1-b1-n2", "b1", "b1-px-n2"):
        with pytest.raises(BenchError, match="is not a case"):
            parse_case(text)


class FakeNvml:
    """One GPU at its power cap, whose temperature cannot be read."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetName": lambda _: b"H100",
            "nvmlDeviceGetPowerUsage": lambda _: 350_000,
            "nvmlDeviceGetClockInfo": lambda _, kind: 1000 * kind,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x1 | 0x4 | 0x40,
        }
        if name == "nvmlDeviceGetTemperature":
            raise self.NVMLError
        if name not in answers:
            raise AttributeError(name)
        return answers[name]


def test_a_gpus_state_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_state, "_nvml", FakeNvml)
    (gpu,) = sample().gpus
    assert (gpu.name, gpu.power_w, gpu.sm_clock_mhz, gpu.memory_clock_mhz) == ("H100", 350.0, 1000.0, 2000.0)
    assert gpu.temperature_c is None
    assert gpu.throttle_reasons == ["sw_power_cap", "hw_thermal_slowdown"]


def test_stolen_time_is_no_work_of_others(monkeypatch: pytest.MonkeyPatch):
    times = SimpleNamespace(user=2.0, nice=1.0, system=1.0, idle=9.0, iowait=4.0, irq=0.0, softirq=1.0, steal=3.0)
    monkeypatch.setattr(machine_state.psutil, "cpu_times", lambda: times)
    assert machine_state._cpu_seconds() == (5.0, 3.0)


def test_disturbances_are_named():
    calm = sample()
    hot = calm.model_copy(update={"gpus": [GpuState(index=0, name="x", throttle_reasons=["hw_slowdown"])]})
    assert disturbance(Limits(), 0.0, 0.05, calm, calm) == ""
    assert disturbance(Limits(), 0.03, 0.2, calm, hot) == (
        "steal 3.0 % above 2 %; load from others 20.0 % above 10 %; GPU 0 throttled (hw_slowdown)"
    )
