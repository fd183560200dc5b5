"""The evidence script without a GPU: everything is skipped with its reason, nothing pretends to have run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studies import gpu_evidence
from bench.studies.gpu_evidence import Done, Step, exit_code, gather, reasons, steps
from runtime.doctor import Finding, Gpu, Report

NO_GPU = Report(
    [Finding("cpu", True, ""), Finding("cuda", False, "no cuda here"), Finding("tensorrt-rtx", False, "no rtx here")],
    Gpu(missing="no driver"),
    {},
    {},
)
H100 = Report(
    [Finding("cuda", True, ""), Finding("tensorrt-rtx", True, "")],
    Gpu(({"name": "H100", "memory_bytes": 80 << 30},), "580", "13.0"),
    {},
    {},
)


def run(missing: dict[str, str], tmp_path: Path, codes: dict[str, int]) -> list[Done]:
    def fake(step: Step, _out: Path) -> tuple[int, str]:
        return codes.get(step.name, 0), "last line"

    return gather(tmp_path / "out", tmp_path, missing, fake, lambda _line: None)


def test_without_a_gpu_each_step_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_evidence, "diagnose", lambda: NO_GPU)
    monkeypatch.setattr(gpu_evidence, "run_step", lambda _s, _o: (0, ""))
    assert gpu_evidence.main(["--out", str(tmp_path / "o"), "--scratch", str(tmp_path / "not" / "there")]) == 4
    found = json.loads((tmp_path / "o" / "evidence.json").read_text())
    status = {s["name"]: (s["status"], s["reason"]) for s in found["steps"]}
    assert status.pop("doctor") == ("done", "")
    assert {s for s, _ in status.values()} == {"skipped"}
    assert status["demo-fp16"][1] == "no cuda here"
    assert status["tensorrt-rtx"][1] == "no rtx here"
    assert found["machine"]["gpu"]["missing"] == "no driver"


def test_small_gpus_and_disks_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no driver" in reasons(NO_GPU, tmp_path)["big gpu"]
    assert "big gpu" not in reasons(H100, tmp_path)
    monkeypatch.setattr(gpu_evidence, "SCRATCH_BYTES", 1 << 60)
    assert "GiB free" in reasons(H100, tmp_path)["disk"]
    done = {d.name: d for d in run({"disk": "full"}, tmp_path, {})}
    assert done["random-7b"].reason == "full"
    assert done["demo-fp16"].status == "done"


def test_failures_verdicts_and_what_depends_on_them(tmp_path: Path) -> None:
    good = run({}, tmp_path, {"demo-fp16": 3})
    assert {d.status for d in good} == {"done"}  # an undecided gate is a result
    assert exit_code(good) == 0
    bad = {d.name: d for d in run({}, tmp_path, {"random-7b": 2})}
    assert bad["random-7b"].status == "failed"
    assert bad["random-7b"].reason == "exit code 2: last line"
    for name in ("export-7b", "llama-2-7b-batch-1", "llama-2-7b-batch-8"):
        assert (bad[name].status, bad[name].reason) == ("skipped", "random-7b failed")
    assert bad["tensorrt-rtx"].status == "done"
    assert exit_code(list(bad.values())) == 1


def test_the_cases_that_are_wanted_are_there(tmp_path: Path) -> None:
    lines = {s.name: " ".join(s.command) for s in steps(tmp_path, tmp_path)}
    for batch in (1, 8):
        assert f"--batch-sizes {batch} --prompt-lengths 128,2048" in lines[f"llama-2-7b-batch-{batch}"]
    assert "--peers" in lines["llama-2-7b-batch-1"]


def test_a_step_keeps_its_output(tmp_path: Path) -> None:
    import sys

    step = Step("x", (sys.executable, "-c", "print('one'); print('two')"), keep_output="x.txt")
    assert gpu_evidence.run_step(step, tmp_path) == (0, "two")
    assert (tmp_path / "x.txt").read_text() == "one\ntwo\n"
