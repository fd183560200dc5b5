"""Everything that is worth knowing from a GPU machine, as one command that leaves records behind.

Each step runs in a process of its own and is skipped with its reason where it cannot run; what was done, skipped or
failed stands in ``evidence.json``. Try: ``python -m bench.studies.gpu_evidence --out reports/gallery/gpu`` (about an
hour; the 7B steps write 27 GB). Exit code 0: all steps done or skipped, one on a GPU at least; 1: a step failed; 4: no
GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench.studies.tables import write_json
from runtime.doctor import Report, diagnose

GIB = 1 << 30
SCRATCH_BYTES = 40 * GIB
SEVEN_B_BYTES = 60 * GIB
STEP_LIMIT_S = 3600
GEMM = """
import json, statistics, sys, time, torch
n, rows = 4096, int(sys.argv[1])
a, b = (torch.randn(s, device="cuda", dtype=torch.float16) for s in ((rows, n), (n, 11008)))
times = []
for _ in range(60):
    torch.cuda.synchronize(); start = time.perf_counter(); a @ b; torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
best = statistics.median(times[20:])
print(json.dumps({"rows": rows, "flops_per_s": 2 * rows * n * 11008 / best, "gpu": torch.cuda.get_device_name(0)}))
"""
"""Rate of the matrix product that a Llama-2-7B prefill consists of (hidden 4,096 to 11,008), fp16."""


@dataclass(frozen=True)
class Step:
    """One thing to run: ``needs`` are requirements by name (see :func:`reasons`), and earlier steps."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    keep_output: str = ""


@dataclass(frozen=True)
class Done:
    """What became of a step: ``done``, ``skipped`` or ``failed``; ``reason`` for the last two."""

    name: str
    status: str
    reason: str
    seconds: float
    command: tuple[str, ...]


def reasons(report: Report, scratch: Path) -> dict[str, str]:
    """Requirements that this machine lacks, each with a sentence."""
    missing = {f.provider: f.detail for f in report.providers if not f.loads}
    memory = max((int(d["memory_bytes"]) for d in report.gpu.devices), default=0)
    if memory < SEVEN_B_BYTES:
        said = f"the GPU has {memory / GIB:.0f} GiB" if memory else (report.gpu.missing or "no GPU")
        missing["big gpu"] = f"ours, eager and compiled 7B models need {SEVEN_B_BYTES // GIB} GiB together: {said}"
    place = scratch.resolve()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if free < SCRATCH_BYTES:
        missing["disk"] = f"{scratch} has {free / GIB:.0f} GiB free; {SCRATCH_BYTES // GIB} are needed (--scratch DIR)"
    return missing


def steps(out: Path, scratch: Path) -> list[Step]:
    """All of it, in order: later steps use the folders of earlier ones."""
    python = sys.executable
    seven, seven_onnx, rtx = scratch / "llama-2-7b", scratch / "llama-2-7b-onnx", scratch / "demo-tensorrt"
    cli, suite = (python, "-m", "bench.cli"), (python, "-m", "pytest", "bench/")
    cuda = ("--provider", "cuda", "--precision", "fp16")
    big = ("cuda", "big gpu", "disk")
    exported = (*big, "random-7b", "export-7b")

    def seven_bench(batch: int) -> Step:
        options = ("--batch-sizes", str(batch), "--prompt-lengths", "128,2048", "--new-tokens", "64", "--peers")
        given = ("--model", str(seven), "--exported", str(seven_onnx), "-k", "prefill or decode or end_to_end")
        where = ("--report-dir", str(out / f"llama-2-7b-batch-{batch}"))
        return Step(f"llama-2-7b-batch-{batch}", (*suite, *cuda, *given, *options, *where), exported)

    return [
        Step("doctor", (*cli, "doctor", "--json"), keep_output="doctor.json"),
        Step("demo-fp16", (*suite, *cuda, "--peers", "--report-dir", str(out / "demo-fp16")), ("cuda",)),
        Step("gpu-tests", (python, "-m", "pytest", "tests", "-m", "gpu", "-q"), ("cuda",), "gpu-tests.txt"),
        Step("gemm-rate", (python, "-c", GEMM, "2048"), ("cuda",), "gemm.json"),
        Step("random-7b", (*cli, "random-model", str(seven), "--precision", "fp16"), big),
        Step("export-7b", (*cli, "export", str(seven), str(seven_onnx), "--precision", "fp16"), exported[:-1]),
        seven_bench(1),
        seven_bench(8),
        Step(
            "export-tensorrt",
            (*cli, "export", "demo", str(rtx), "--precision", "fp16", "--target", "tensorrt"),
            ("tensorrt-rtx",),
        ),
        Step(
            "tensorrt-rtx",
            (*cli, "generate", str(rtx), "The capital of France is", "--provider", "tensorrt-rtx", "--json"),
            ("tensorrt-rtx", "export-tensorrt"),
            "tensorrt-rtx.json",
        ),
    ]


Runner = Callable[[Step, Path], tuple[int, str]]


def run_step(step: Step, out: Path) -> tuple[int, str]:
    """Exit code and last line of one step; standard output is kept where the step says so."""
    try:
        done = subprocess.run(
            step.command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=STEP_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return 1, f"took longer than {STEP_LIMIT_S} s"
    if step.keep_output:
        (out / step.keep_output).write_text(done.stdout, encoding="utf-8")
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return done.returncode, lines[-1][:300]


def gather(out: Path, scratch: Path, missing: dict[str, str], runner: Runner, say: Callable[[str], None]) -> list[Done]:
    """Run what can run. A step whose own requirement failed is skipped like one whose requirement is missing."""
    out.mkdir(parents=True, exist_ok=True)
    lacking = dict(missing)
    found: list[Done] = []
    for step in steps(out, scratch):
        why = next((lacking[n] for n in step.needs if n in lacking), None)
        status, reason, started = "skipped", why or "", time.perf_counter()
        if why is None:
            code, last = runner(step, out)
            # A gate's verdict (1, 3) is a result as well: the record stands, whatever it says.
            verdict = "bench/" in step.command and code in (1, 3)
            status, reason = "done" if code == 0 or verdict else "failed", f"exit code {code}: {last}" if code else ""
        if status == "failed":
            lacking[step.name] = f"{step.name} failed"
        found.append(Done(step.name, status, reason, time.perf_counter() - started, step.command))
        say(f"{step.name}: {status}" + (f" ({reason})" if reason else ""))
    return found


def exit_code(found: Sequence[Done]) -> int:
    """1 when a step failed, 4 when nothing but the doctor ran, else 0."""
    if any(d.status == "failed" for d in found):
        return 1
    return 0 if any(d.status == "done" and d.name != "doctor" for d in found) else 4


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.gpu_evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/gallery/gpu"), help="where the records go")
    parser.add_argument("--scratch", type=Path, default=Path("build/gpu-evidence"), help="where the 7B model goes")
    args = parser.parse_args(argv)
    report = diagnose()
    say = partial(print, file=sys.stderr, flush=True)
    found = gather(args.out, args.scratch, reasons(report, args.scratch), run_step, say)
    target = args.out / "evidence.json"
    write_json(target, {"machine": asdict(report), "steps": [asdict(d) for d in found]})
    print(target)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
