"""The export table: what each way to export a checkpoint costs, and what it gives.

Every export runs in a process of its own (seconds, peak memory), every result is scored against PyTorch fp32 on the
same windows of the project's prose, decode times are medians of interleaved rounds.
Try: ``python -m bench.studies.export_table demo --out docs/measurements/export-table-demo.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.data.items import chunked
from bench.errors import BenchError
from bench.gate import statistics as gate
from bench.gate.modes import SEED
from bench.gate.statistics import TIERS, TokenScores, score_tokens
from bench.latency.interleave import interleave
from bench.peers.exports import genai_export
from bench.process.child import json_of
from bench.studies.tables import markdown, show, write_json
from export.manifest import Manifest, first_line
from reports.record import Case
from reports.validation import overall

OURS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, target tensorrt": {"target": "tensorrt"},
    "fp16": {"precision": "fp16"},
    "fp16, target tensorrt": {"precision": "fp16", "target": "tensorrt"},
    "int8": {"precision": "int8"},
    "int8, nothing kept": {"precision": "int8", "keep_float": "none"},
    "int8, nothing kept, level 0": {"precision": "int8", "keep_float": "none", "accuracy_level": 0},
    "int4 rtn": {"precision": "int4", "method": "rtn"},
    "int4 rtn, no zero points": {"precision": "int4", "method": "rtn", "zero_points": "none"},
    "int4 gptq": {"precision": "int4", "method": "gptq"},
    "int4 kquant": {"precision": "int4", "method": "kquant"},
    "int4 hqq": {"precision": "int4", "method": "hqq"},
    "int4 hqq, integer zero points": {"precision": "int4", "method": "hqq", "zero_points": "integer"},
}
"""Rows of ours: name -> fields of :class:`export.spec.ExportSpec`."""
PEERS = ("optimum plain", "optimum O2", "genai builder fp32", "genai builder int4")


@dataclass
class Row:
    """One export. Values that could not be had are None, ``note`` says why."""

    name: str
    seconds: float | None = None
    peak_bytes: int | None = None
    disk_bytes: int | None = None
    nodes: int | None = None
    fused: str = ""
    decode_ms: float | None = None
    rounds_ms: list[float] = field(default_factory=list)
    max_logit: float | None = None
    mean_logit: float | None = None
    ppl_ratio: float | None = None
    mean_kld: float | None = None
    tail_kld: float | None = None
    top1: float | None = None
    verdict: str = ""
    note: str = ""


def export_once(job: dict[str, Any]) -> dict[str, Any]:
    """One export in this process. ``job``: kind (ours, plain, O2), checkpoint, out, spec."""
    from bench.process.peak import peak_bytes

    started = time.perf_counter()
    out = Path(job["out"])
    if job["kind"] == "ours":
        from bench.data.loading import load_shipped
        from export.pipeline import export_model
        from export.spec import ExportSpec

        export_model(ExportSpec(job["checkpoint"], **job["spec"]), out, calibration=load_shipped().calibration())
    else:
        from bench.peers.exports import optimum_export

        optimum_export(Path(job["checkpoint"]), out, job["kind"])
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}


def export_apart(kind: str, checkpoint: Path, out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """:func:`export_once` in a process of its own."""
    job = {"kind": kind, "checkpoint": str(checkpoint), "out": str(out), "spec": spec}
    found: dict[str, Any] = json_of([sys.executable, "-m", "bench.studies.export_table", "--once", json.dumps(job)])
    return found


def _describe(row: Row, folder: Path, manifest: Manifest) -> None:
    fused, known = manifest.fused_ops, ("GroupQueryAttention", "Attention", "MultiHeadAttention", "MatMulNBits")
    row.nodes = manifest.node_count
    row.fused = ", ".join(f"{fused[op]} {op}" for op in known if op in fused) or "no fused attention"
    row.disk_bytes = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _score(row: Row, session: Any, windows: list[list[int]], baseline: list[Any], tier: str) -> None:
    scores: list[TokenScores] = []
    largest, means = [], []
    for ids, reference in zip(windows, baseline, strict=True):
        logits = session.score(ids)
        scores.append(score_tokens(logits, reference, ids))
        difference = np.abs(logits - reference)
        largest.append(float(difference.max()))
        means.append(float(difference.mean()))
    ratio, mean = gate.perplexity_ratio(scores, [], TIERS[tier], SEED), gate.mean_kld(scores, [], TIERS[tier], SEED)
    tail, top1 = gate.tail_kld(scores, [], TIERS[tier], None), gate.top1_agreement(scores, [], TIERS[tier], SEED, None)
    row.max_logit, row.mean_logit = max(largest), statistics.fmean(means)
    row.ppl_ratio, row.mean_kld, row.tail_kld, row.top1 = ratio.value, mean.value, tail.value, top1.value
    row.verdict = f"{tier} {overall(m.status for m in (ratio, mean, tail, top1))}"


def make(
    checkpoint: Path, names: Sequence[str], windows: int, rounds: int, genai: Path | None, keep: Path | None
) -> list[Row]:
    """Export, score and time every named way; failures become notes."""
    from transformers import AutoTokenizer

    from bench.data.loading import load_shipped
    from runtime.loading import load
    from runtime.torch_session import TorchSession

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    texts = [w for t in load_shipped().prose() for w in chunked(tokenizer(t)["input_ids"], 256)]
    chosen = texts[:: max(1, len(texts) // windows)][:windows]
    log = Console(stderr=True)
    rows = []
    with TorchSession(checkpoint) as baseline:
        references = [baseline.score(ids).copy() for ids in chosen]
    with ExitStack() as held:
        work = keep or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="export-table-")))
        sessions: dict[str, Any] = {}
        for name in names:
            row = Row(name)
            rows.append(row)
            out = work / name.replace(" ", "-").replace(",", "")
            log.print(f"{name}", style="dim")
            try:
                if name in OURS:
                    cost = export_apart("ours", checkpoint, out, OURS[name])
                elif name.startswith("optimum"):
                    cost = export_apart(name.split()[1], checkpoint, out, {})
                elif genai is None:
                    raise BenchError("needs --genai-python, an environment of its own with onnxruntime-genai")
                else:
                    cost = genai_export(genai, checkpoint, out, name.split()[2])
                row.seconds, row.peak_bytes = cost["seconds"], cost["peak_bytes"]
                tier = OURS.get(name, {}).get("precision", "int4" if name.endswith("int4") else "fp32")
                with load(out, verify=False) as session:
                    _describe(row, out, session.manifest)
                    _score(row, session, chosen, references, tier)
                log.print(f"  {row.seconds:.1f} s, mean KLD {row.mean_kld:.1e}, {row.verdict}", style="dim")
                sessions[name] = held.enter_context(load(out, verify=False))
            except Exception as e:  # a peer that fails is a result, not the end of the table
                row.note = first_line(e)
                log.print(f"{name}: {row.note}", style="red", markup=False)
        rows.append(Row("PyTorch eager fp32"))
        sessions[rows[-1].name] = held.enter_context(TorchSession(checkpoint))
        series = interleave(sessions, chosen[0], Case(batch=1, prompt=128, new_tokens=25), rounds, 1)
    times = {s.side: [1e3 * statistics.median(r.gaps_s) for r in s.rounds] for s in series}
    for row in rows:
        row.rounds_ms = times.get(row.name, [])
        row.decode_ms = statistics.median(row.rounds_ms) if row.rounds_ms else None
    return rows


COLUMNS = (
    ("export", lambda r: r.name),
    ("seconds", lambda r: _number(r.seconds, "{:.1f}")),
    ("peak GB", lambda r: _number(r.peak_bytes and r.peak_bytes / 1e9, "{:.2f}")),
    ("disk MB", lambda r: _number(r.disk_bytes and r.disk_bytes / 1e6, "{:.0f}")),
    ("nodes", lambda r: _number(r.nodes, "{}")),
    ("fused", lambda r: r.fused),
    ("decode ms", lambda r: _number(r.decode_ms, "{:.1f}")),
    ("max, mean logit difference", lambda r: f"{r.max_logit:.1e}, {r.mean_logit:.1e}" if r.max_logit else ""),
    ("PPL ratio", lambda r: _number(r.ppl_ratio, "{:.5f}")),
    ("mean KLD", lambda r: _number(r.mean_kld, "{:.1e}")),
    ("99.9 % KLD", lambda r: _number(r.tail_kld, "{:.1e}")),
    ("top-1 %", lambda r: _number(r.top1 and r.top1 * 100, "{:.2f}")),
    ("tier", lambda r: r.note or r.verdict),
)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.export_table", description="compare ways to export")
    parser.add_argument("model", nargs="?", default="demo", help="'demo' or a checkpoint folder")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    known = (*OURS, *PEERS)
    parser.add_argument("--only", nargs="*", choices=known, metavar="ROW", help=f"rows, of: {'; '.join(known)}")
    parser.add_argument("--windows", type=int, default=40, help="windows of 256 tokens that are scored")
    parser.add_argument("--rounds", type=int, default=6, help="decode rounds")
    parser.add_argument("--genai-python", type=Path, help="python of an environment with onnxruntime-genai")
    parser.add_argument("--keep", type=Path, help="keep the exports in this folder")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the raw rows go beside it as .json")
    args = parser.parse_args(arguments)
    if args.once:
        print(json.dumps(export_once(json.loads(args.once))))
        return 0
    from export.source import resolve

    source = resolve(args.model)
    rows = make(source.folder, args.only or known, args.windows, args.rounds, args.genai_python, args.keep)
    columns, cells = [title for title, _ in COLUMNS], [[get(row) for _, get in COLUMNS] for row in rows]
    show(columns, cells)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(markdown(columns, cells), encoding="utf-8")
        raw = {"model": source.name, "origin": source.origin, "rows": [asdict(r) for r in rows]}
        write_json(args.out.with_suffix(".json"), raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
