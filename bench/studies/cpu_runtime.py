"""The runtime on the CPU, measured in one run: floors, peers, long contexts, batches, Python's share of a step.

``pytest bench/`` says how fast one folder is; this says how far the runtime is from what the machine allows and from
other runtimes, with the limits that the project set itself, and shows what a decode step's time goes into.
Try: ``python -m bench.studies.cpu_runtime demo OUT --genai-python PYTHON --gguf FILE`` (about 6 minutes on 2 cores).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig

from bench.deployment import Deployment
from bench.latency.interleave import interleave, peak_memory
from bench.latency.profile import profiled_run
from bench.machine.bandwidth import CpuBandwidth, GemmFloor, median_time
from bench.peers.choice import choose
from bench.peers.exports import genai_export
from bench.peers.genai import GenaiSide
from bench.peers.llama_cpp import LABEL as LLAMA_CPP
from bench.peers.llama_cpp import LlamaCppSide
from bench.studies.tables import markdown, show, write_json
from reports.record import Case, Floor
from reports.stats import floor_multiples
from reports.targets import FLOOR_LIMIT
from runtime.ort_session import OrtSession
from runtime.session import Session

RTN = {"precision": "int4", "method": "rtn", "lm_head": "int4"}
OURS: dict[str, dict[str, Any]] = {
    "ours fp32": {},
    "ours int4": {"precision": "int4"},
    "ours int4 rtn, head too": RTN,
    "ours int4 rtn, head too, symmetric": {**RTN, "zero_points": "none"},
}
"""Our sides: name -> fields of :class:`export.spec.ExportSpec`. The last is quantised as genai's builder does it, the
one before it as llama.cpp's Q4_1 is (a smallest value for each block)."""
FP32, INT4, INT4_Q4_1, INT4_ALIKE = OURS
GENAI = {"genai fp32": "fp32", "genai int4": "int4"}
PROMPT, NEW, LONG, BATCH = 128, 32, 2000, 4
CASE = Case(batch=1, prompt=PROMPT, new_tokens=NEW)
VOCAB = 30_000
"""Prompts are drawn from the first so many tokens."""
SEED = 20260101


@dataclass(frozen=True)
class Metric:
    """The median over rounds, its quartiles, and the limit that it should keep (None: shown only)."""

    name: str
    value: float
    quartiles: tuple[float, float]
    limit: float | None
    at_most: bool = True

    @property
    def status(self) -> str:
        """``MET``, ``MISSED`` or ``shown``."""
        if self.limit is None:
            return "shown"
        kept = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "MET" if kept else "MISSED"


@dataclass
class Measurements:
    """Everything of one run; times in seconds, bandwidth in bytes per second."""

    metrics: list[Metric] = field(default_factory=list)
    ttft_s: dict[str, float] = field(default_factory=dict)
    tpot_s: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    profile_us: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """What was profiled -> operator -> microseconds and nodes; ``whole`` is the run."""
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, rounds: ArrayLike, limit: float | None = None, at_most: bool = True) -> None:
        """The median of these, as a metric."""
        low, median, high = (float(q) for q in np.quantile(np.asarray(rounds, np.float64), (0.25, 0.5, 0.75)))
        self.metrics.append(Metric(name, median, (low, high), limit, at_most))


def python_share(session: OrtSession, steps: int = 64) -> float:
    """Share of a greedy decode step that is spent outside ONNX Runtime's run; the choice of the token included."""
    run, inside = session._decode.run, 0.0

    def timed(binding: Any) -> None:
        nonlocal inside
        began = time.perf_counter()
        run(binding)
        inside += time.perf_counter() - began

    logits = session.prefill([list(range(1, PROMPT + 1))], reserve=steps + 1)
    with patch.object(session._decode, "run", timed):
        started = time.perf_counter()
        for _ in range(steps):
            logits = session.step([int(logits.argmax())])
        total = time.perf_counter() - started
    return 1 - inside / total


PROFILED: dict[str, tuple[str, int, int, bool]] = {
    "decode, context 128": (FP32, 1, PROMPT, False),
    "decode, context 2,000": (FP32, 1, LONG, False),
    "decode, batch 4": (FP32, BATCH, PROMPT, False),
    "prefill 128": (FP32, 1, PROMPT, True),
    "int4 rtn decode": (INT4_Q4_1, 1, PROMPT, False),
}
"""What is profiled: name -> side, batch, context, and whether the prefill is looked at instead of the steps."""


def profile(
    folder: Path, threads: int, batch: int = 1, context: int = PROMPT, prefill: bool = False, steps: int = 40
) -> dict[str, list[float]]:
    """Per operator of a decode step (or of a prefill): microseconds in its kernels, and how many nodes."""
    from runtime.loading import load

    rows = [list(range(1, context + 1))] * batch
    with tempfile.TemporaryDirectory() as scratch:
        session = load(folder, threads=threads, verify=False, profile=Path(scratch) / "decode")
        found = profiled_run(session, rows, steps, steps // 2, prefill)
        session.close()
    return {name: list(row) for name, row in found.items()}


def open_sides(
    checkpoint: Path, work: Path, genai: Path | None, gguf: Path | None, threads: int, measured: Measurements
) -> tuple[dict[str, Path], dict[str, Session]]:
    """Folders, exported where ``work`` lacks them, and sides by name; others are named in ``measured.skipped``."""
    from export.pipeline import export_model
    from export.spec import ExportSpec
    from runtime.loading import load

    folders = {name: work / name.replace(" ", "-").replace(",", "") for name in (*OURS, *GENAI)}
    for name, fields in OURS.items():
        if not folders[name].exists():
            export_model(ExportSpec(str(checkpoint), **fields), folders[name])
    for name, precision in GENAI.items():
        if genai is None:
            measured.skipped[name] = "no --genai-python, an environment with onnxruntime-genai and its builder"
        elif not folders[name].exists():
            genai_export(genai, checkpoint, folders[name], precision)
    sides: dict[str, Session] = {name: load(folders[name], threads=threads, verify=False) for name in OURS}
    if genai is not None:
        sides |= {name: GenaiSide(genai, folders[name], threads, sides[FP32].info) for name in GENAI}
    why = choose("cpu", sides[FP32].manifest.attention, gguf).skipped.get(LLAMA_CPP)  # type: ignore[attr-defined]
    if why:
        measured.skipped[LLAMA_CPP] = why
    else:
        assert gguf is not None
        sides[LLAMA_CPP] = LlamaCppSide(gguf, threads)
    return folders, sides


def interleaved(
    sides: dict[str, Session], measured: Measurements, config: PretrainedConfig, rounds: int, threads: int
) -> None:
    """Prompt 128, 32 new tokens on every side in turn, the floors beside each round."""
    rng = np.random.default_rng(SEED)
    bandwidth, gemm = CpuBandwidth(threads), GemmFloor(config, PROMPT)
    floors: list[tuple[float, float]] = []
    stream = rng.integers(1, config.vocab_size, 16 * PROMPT).tolist()
    series = interleave(sides, stream, CASE, rounds, 1, probe=lambda: floors.append((bandwidth(), gemm())))
    speeds, products = ([f[k] for f in floors] for k in (0, 1))
    ttft = {s.side: [r.ttft_s for r in s.rounds] for s in series}
    tpot = {s.side: [r.tpot_s or 0.0 for r in s.rounds] for s in series}
    measured.bandwidth = statistics.median(speeds)
    measured.ttft_s = {name: statistics.median(ttft[name]) for name in sides}
    measured.tpot_s = {name: statistics.median(tpot[name]) for name in sides}
    manifest = sides[FP32].manifest  # type: ignore[attr-defined]
    floor = Floor(
        method=bandwidth.method,
        bandwidth_samples=speeds,
        weight_bytes=manifest.decode_weight_bytes,
        kv_bytes_per_token=manifest.kv.bytes_per_token(),
    )
    measured.add("fp32 decode, times the memory floor", floor_multiples(floor, CASE, tpot[FP32]), FLOOR_LIMIT)
    measured.add("prefill 128, times the matrix-product floor", np.divide(ttft[FP32], products), 1.25)
    for name, times, ours, theirs, limit in (
        ("fp32 decode, of genai", tpot, FP32, "genai fp32", 0.95),
        ("prefill 128, of genai", ttft, FP32, "genai fp32", 0.60),
        ("int4 decode, of genai int4, quantised alike", tpot, INT4_ALIKE, "genai int4", 0.85),
        ("int4 decode, of genai int4, ours by HQQ", tpot, INT4, "genai int4", None),
        ("int4 decode, of llama.cpp Q4_1, ours rtn", tpot, INT4_Q4_1, LLAMA_CPP, 0.85),
        ("int4 decode, of llama.cpp Q4_1, ours by HQQ", tpot, INT4, LLAMA_CPP, 0.85),
        ("fp32 prefill 128, of llama.cpp Q4_1", ttft, FP32, LLAMA_CPP, None),
    ):
        if theirs in sides:
            measured.add(name, np.divide(times[ours], times[theirs]), limit)


def _steps(session: Session, rng: np.random.Generator, context: int, batch: int, steps: int = 16) -> tuple[float, ...]:
    """Seconds of a prefill and of the median decode step after it."""
    prompts = [rng.integers(1, VOCAB, context).tolist() for _ in range(batch)]
    started = time.perf_counter()
    session.prefill(prompts, steps + 1)
    prefill = time.perf_counter() - started
    return prefill, median_time(lambda: session.step([7] * batch), steps)


def long_and_wide(session: Session, measured: Measurements, rounds: int) -> None:
    """Context 2,000 against 128, batch 4 against 1; neighbours in time are compared."""
    rng = np.random.default_rng(SEED)
    _steps(session, rng, PROMPT, BATCH)
    ratios = [_steps(session, rng, LONG, 1)[1] / _steps(session, rng, PROMPT, 1)[1] for _ in range(rounds)]
    measured.add("time per token at context 2,000, of that at 128", ratios, 1.35)
    gains, costs = [], []
    for _ in range(rounds):
        single = [_steps(session, rng, PROMPT, 1) for _ in range(BATCH)]
        four = _steps(session, rng, PROMPT, BATCH)
        gains.append(BATCH * statistics.median(s[1] for s in single) / four[1])
        costs.append(four[0] / sum(s[0] for s in single))
    measured.add("batch 4 decode, tokens/s of batch 1's", gains, 3.3, at_most=False)
    measured.add("batch 4 prefill, of four single ones", costs, 1.1)


def measure(
    checkpoint: Path, work: Path, rounds: int, genai: Path | None, gguf: Path | None, threads: int
) -> Measurements:
    """Everything, in one run."""
    measured = Measurements()
    folders, sides = open_sides(checkpoint, work, genai, gguf, threads, measured)
    config = AutoConfig.from_pretrained(folders[FP32])
    try:
        interleaved(sides, measured, config, rounds, threads)
        ours = sides[FP32]
        assert isinstance(ours, OrtSession)
        long_and_wide(ours, measured, max(3, rounds // 2))
        for precision, side in (("fp32", ours), ("int4", sides[INT4])):
            assert isinstance(side, OrtSession)
            shares = [python_share(side) for _ in range(5)]
            measured.add(f"Python's share of a decode step, {precision}", shares, 0.03)
        manifest = ours.manifest
    finally:
        for side in sides.values():
            side.close()
    memory = peak_memory(FP32, CASE, "onnxruntime", folders[FP32], "fp32", Deployment("cpu", threads))
    held = sum(f.stat().st_size for f in folders[FP32].glob("*.data"))
    held += (PROMPT + NEW) * manifest.kv.bytes_per_token()
    measured.add("peak memory of a session, of weights and KV", [memory.own_bytes / held], 1.25)
    measured.profile_us = {
        name: profile(folders[side], threads, batch, context, prefill, steps=12 if prefill else 40)
        for name, (side, batch, context, prefill) in PROFILED.items()
    }
    return measured


def tables(measured: Measurements) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """Title, columns and rows of what there is to show."""
    rows: list[tuple[str, ...]] = []
    for f in measured.metrics:
        limit = "" if f.limit is None else f"{'at most' if f.at_most else 'at least'} {f.limit:g}"
        rows.append((f.name, f"{f.value:.3f}", f"{f.quartiles[0]:.3f} to {f.quartiles[1]:.3f}", limit, f.status))
    sides = [(n, f"{t * 1e3:.1f}", f"{measured.tpot_s[n] * 1e3:.2f}") for n, t in measured.ttft_s.items()]
    found = measured.profile_us.values()
    profiles = [
        (name, *("{:,.0f} ({:.0f})".format(*f[name]) if name in f else "" for f in found))
        for name in dict.fromkeys(n for f in found for n in list(f)[:8])
    ]
    bandwidth = f"Metrics, memory read at {measured.bandwidth / 1e9:.1f} GB/s"
    share = "What the time goes into: microseconds (nodes) of one run under ONNX Runtime's profiler"
    return [
        (bandwidth, ("metric", "median", "quartiles", "limit", ""), rows),
        ("Sides, batch 1, prompt 128, 32 new tokens", ("side", "TTFT ms", "TPOT ms"), sides),
        (share, ("operator", *measured.profile_us), profiles),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. Exit code 0 whatever was measured: limits are shown, not enforced."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.cpu_runtime", description="the runtime on the CPU")
    parser.add_argument("model", help="'demo' or a checkpoint folder")
    parser.add_argument("out", type=Path, help="folder for cpu_runtime.json, .md and the exports, which are kept")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--genai-python", type=Path, help="python of an environment with onnxruntime-genai")
    parser.add_argument("--gguf", type=Path, help="file for llama.cpp (llama-cpp-python must be installed)")
    args = parser.parse_args(arguments)
    from export.source import resolve

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = resolve(args.model).folder
    found = measure(checkpoint, args.out, args.rounds, args.genai_python, args.gguf, args.threads)
    metrics = [{**asdict(m), "status": m.status} for m in found.metrics]
    write_json(args.out / "cpu_runtime.json", {**asdict(found), "metrics": metrics})
    parts = []
    for title, columns, rows in tables(found):
        show(columns, rows, title)
        parts.append(f"**{title}**\n\n{markdown(columns, rows)}")
    for name, why in found.skipped.items():
        parts.append(f"Skipped {name}: {why}.")
        Console().print(f"skipped {name}: {why}", style="yellow", markup=False)
    (args.out / "cpu_runtime.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
