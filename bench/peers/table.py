"""The peers' table: ratios to the side under test, each beside its parity. Compute and rendering, both small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.text import Text

from reports.record import Round, RunRecord, Series
from reports.render.terminal import plain_table

PARITY = "parity"
"""Key of a side's details that holds its parity line."""


@dataclass(frozen=True)
class PeerRow:
    """Medians in seconds; ratios are medians of paired rounds, this side over the candidate (above 1: it is slower)."""

    title: str
    ttft_s: float
    tpot_s: float
    prefill_ratio: float
    decode_ratio: float
    parity: str


def peer_rows(record: RunRecord) -> list[PeerRow]:
    """One row a side of the headline case, in the record's order; empty without latency."""
    if not record.series:
        return []
    case = record.series[0].case
    found = {s.side: s for s in record.series if s.case == case}
    candidate = next((found[s.label] for s in record.sides if s.role == "candidate" and s.label in found), None)
    if candidate is None:
        return []
    rows = []
    for side in record.sides:
        if side.label not in found:
            continue
        series = found[side.label]
        parity = {"candidate": "see the gate", "baseline": "the baseline"}.get(side.role)
        rows.append(
            PeerRow(
                side.title,
                median(_ttft(r) for r in series.rounds),
                median(_tpot(r) for r in series.rounds),
                _ratio(series, candidate.rounds, "ttft_s"),
                _ratio(series, candidate.rounds, "tpot_s"),
                str(parity or side.details.get(PARITY, "not measured")),
            )
        )
    return rows


def _ttft(r: Round) -> float:
    return r.ttft_s


def _tpot(r: Round) -> float:
    return r.tpot_s or 0.0


def _ratio(series: Series, ours: Sequence[Round], metric: str) -> float:
    pairs = zip(series.rounds, ours, strict=True)
    return median(float(getattr(a, metric)) / float(getattr(b, metric)) for a, b in pairs)


def print_peers(rows: Sequence[PeerRow], skipped: dict[str, str], console: Console) -> None:
    """A table, and a line for each peer that could not take part."""
    title = "Peers, one interleaved run; x ours: above 1 is slower"
    table = plain_table(title, "side, and is it the same model?", "TTFT", "x ours", "TPOT", "x ours")
    for r in rows:
        said = Text.assemble(r.title, "\n", (f"  {r.parity}", "dim"))
        ms = f"{r.ttft_s * 1e3:.1f} ms", f"{r.tpot_s * 1e3:.2f} ms"
        table.add_row(said, ms[0], f"{r.prefill_ratio:.2f}", ms[1], f"{r.decode_ratio:.2f}")
    console.print(table)
    for label, why in skipped.items():
        console.print(f"{label} skipped: {why}", highlight=False, markup=False)
