"""Prompts by their length on the CPU: chunks over the KV cache, both attention kernels, PyTorch, onnxruntime-genai.

Everything in one run, interleaved round by round; memory in processes of their own.
Try: ``python -m bench.studies.prefill demo OUT --lengths 128 1024 --rounds 3`` (about a minute on 2 cores).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.latency.interleave import interleave
from bench.latency.profile import profiled_run
from bench.machine.bandwidth import GemmFloor
from bench.peers.genai import LABEL as GENAI
from bench.peers.genai import GenaiSide, genai_python
from bench.studies.tables import markdown, show, write_json
from reports.record import Case
from runtime.session import Ids, Logits, Session, SessionInfo

KERNELS = {"": "", "old kernel, ": "1"}
"""Names of GroupQueryAttention's kernels on the CPU, and the value of :data:`SWITCH` that chooses them."""
SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Environment variable of onnxruntime 1.28 and newer, read when a session is made: the kernel of 1.27."""
WHOLE = "whole prompt"
TORCH = "PyTorch eager"
LENGTHS = (128, 512, 1024, 2048, 4096)
SEED = 20261128


class InChunks:
    """A side that prefills through another one's session, in chunks of its own length."""

    def __init__(self, session: Any, chunk: int) -> None:
        self._session, self._chunk = session, chunk

    @property
    def info(self) -> SessionInfo:
        """Of the session."""
        info: SessionInfo = self._session.info
        return info

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """As the session's, in chunks."""
        self._session._chunk = self._chunk
        logits: Logits = self._session.prefill(ids, reserve)
        return logits

    def step(self, ids: Sequence[int]) -> Logits:
        """As the session's."""
        logits: Logits = self._session.step(ids)
        return logits

    def score(self, ids: Sequence[int]) -> Logits:
        """As the session's."""
        logits: Logits = self._session.score(ids)
        return logits

    def close(self) -> None:
        """Close the session; closing it twice is allowed."""
        self._session.close()


@dataclass(frozen=True)
class Row:
    """Seconds of each round of one side at one length; ``products_s``: the matrix products alone, beside each round."""

    length: int
    batch: int
    side: str
    ttft_s: list[float]
    tpot_s: list[float]
    products_s: list[float]


def opened(folder: Path, kernel: str, threads: int, **more: Any) -> Any:
    """A session with one of :data:`KERNELS`."""
    from runtime.loading import load

    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = KERNELS[kernel] or "0"
    try:
        return load(folder, threads=threads, verify=False, **more)
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def sides_of(folder: Path, checkpoint: Path, chunks: Sequence[int], peers: bool, threads: int) -> dict[str, Session]:
    """Ours by kernel and chunk, and the peers that are there."""
    from runtime.torch_session import TorchSession

    sides: dict[str, Session] = {}
    for kernel in KERNELS:
        session = opened(folder, kernel, threads)
        for chunk in (0, *chunks):
            sides[f"{kernel}{f'chunks of {chunk}' if chunk else WHOLE}"] = InChunks(session, chunk)
    if peers:
        sides[TORCH] = TorchSession(checkpoint, attention="eager", threads=threads)
        if python := genai_python():
            sides[GENAI] = GenaiSide(python, folder, threads, sides[WHOLE].info)
    return sides


def measure(
    sides: dict[str, Session], config: Any, lengths: Sequence[int], batch: int, new: int, rounds: int
) -> list[Row]:
    """Every side at every length that the context holds."""
    rng = np.random.default_rng(SEED)
    found = []
    for length in lengths:
        if length + new > config.max_position_embeddings:
            continue
        floor, floors = GemmFloor(config, length), list[float]()
        case = Case(batch=batch, prompt=length, new_tokens=new)
        stream = rng.integers(1, config.vocab_size, 4 * batch * length).tolist()

        def probe(floor: GemmFloor = floor, floors: list[float] = floors) -> None:
            floors.append(batch * floor())

        for s in interleave(sides, stream, case, rounds, 1, probe=probe):
            ttft, tpot = [r.ttft_s for r in s.rounds], [r.tpot_s or 0.0 for r in s.rounds]
            found.append(Row(length, batch, s.side, ttft, tpot, floors))
            print(f"{s.side}, {batch} x {length}: {statistics.median(ttft) * 1e3:.0f} ms", file=sys.stderr, flush=True)
    return found


def ratio(rows: Sequence[Row], length: int, side: str, of: str) -> float | None:
    """Median over the rounds of one side's time to the first token divided by another's."""
    times = {r.side: r.ttft_s for r in rows if r.length == length}
    if side not in times or of not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[side], times[of], strict=True))


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row a side: milliseconds at each length, and in brackets the multiple of the whole prompt's time."""
    lengths = sorted({r.length for r in rows})
    out = []
    for side in dict.fromkeys(r.side for r in rows):
        cells = []
        for length in lengths:
            row = next(r for r in rows if r.side == side and r.length == length)
            cells.append(f"{statistics.median(row.ttft_s) * 1e3:,.0f} ({ratio(rows, length, side, WHOLE):.2f})")
        out.append((side, *cells))
    floors = [next(r for r in rows if r.length == n).products_s for n in lengths]
    out.append(("matrix products alone (PyTorch)", *(f"{statistics.median(f) * 1e3:,.0f}" for f in floors)))
    return ("ms to the first token", *(f"{n:,} tokens" for n in lengths)), out


def profiles(folder: Path, lengths: Sequence[int], threads: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Microseconds and nodes by operator of a prefill, by kernel and length."""
    from tempfile import TemporaryDirectory

    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kernel in KERNELS:
        for length in lengths:
            with TemporaryDirectory() as scratch:
                session = opened(folder, kernel, threads, profile=Path(scratch) / "p", prefill_chunk=0)
                rows = [list(range(1, length + 1))]
                found[f"{kernel}{length:,} tokens"] = dict(profiled_run(session, rows, 4, 3, True))
                session.close()
    return found


def peak_mb(folder: Path, length: int, chunk: int, threads: int) -> float:
    """Peak resident memory of a process that loads the folder and prefills once, MB."""
    code = (
        "from bench.process.peak import peak_bytes\nfrom runtime.loading import load\n"
        f"s = load({str(folder)!r}, threads={threads}, verify=False, prefill_chunk={chunk})\n"
        f"s.prefill([list(range(1, {length} + 1))])\nprint(peak_bytes())"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(said.stdout.split()[-1]) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.prefill", description="prompts by their length")
    parser.add_argument("model", help="'demo' or a checkpoint folder")
    parser.add_argument("out", type=Path, help="folder for prefill.json, prefill.md and the export, which is kept")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--chunks", type=int, nargs="*", default=(512, 256, 128))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="neither PyTorch nor onnxruntime-genai")
    parser.add_argument("--no-profile", action="store_true", help="no profile by operator, no memory")
    args = parser.parse_args(arguments)
    from export.pipeline import export_model, load_config
    from export.source import resolve
    from export.spec import ExportSpec

    source = resolve(args.model)
    folder = args.out / args.precision
    export_model(ExportSpec(args.model, args.precision), folder, source=source)
    config = load_config(source)
    sides = sides_of(folder, source.folder, args.chunks, not args.no_peers, args.threads)
    try:
        rows = measure(sides, config, args.lengths, args.batch, args.new_tokens, args.rounds)
    finally:
        for side in sides.values():
            side.close()
    columns, lines = table(rows)
    parts = [
        (f"{args.precision}, batch {args.batch}, {args.rounds} rounds (of the whole prompt's time)", columns, lines)
    ]
    found: dict[str, Any] = {"rows": [asdict(r) for r in rows]}
    if not args.no_profile:
        lengths = sorted({r.length for r in rows})
        by_operator = found["profile_us"] = profiles(folder, lengths, args.threads)
        names = list(dict.fromkeys(n for p in by_operator.values() for n in list(p)[:6]))
        cells = [
            (n, *(f"{p[n][0] / 1e3:,.0f} ({p[n][1]:.0f})" if n in p else "" for p in by_operator.values()))
            for n in names
        ]
        parts.append(("Milliseconds (nodes) by operator, whole prompt", ("operator", *by_operator), cells))
        memory = found["peak_mb"] = {
            f"{n:,} tokens": {str(c): peak_mb(folder, n, c, args.threads) for c in (0, *args.chunks)} for n in lengths
        }
        titles = (WHOLE, *(f"chunks of {c}" for c in args.chunks))
        held = [(n, *(f"{m:,.0f}" for m in by_chunk.values())) for n, by_chunk in memory.items()]
        parts.append(("Peak memory of a process, MB", ("prompt", *titles), held))
    write_json(args.out / "prefill.json", found)
    text = []
    for title, head, body in parts:
        show(head, body, title)
        text.append(f"**{title}**\n\n{markdown(head, body)}")
    (args.out / "prefill.md").write_text("\n".join(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
