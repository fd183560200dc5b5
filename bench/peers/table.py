"""The peers' table: ratios to the side under test, each beside its parity. Compute and rendering, both small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from reports.record import RunRecord
from reports.render.terminal import plain_table
from reports.stats import Comparison, compare

PARITY = "parity"
"""Key of a side's details that holds its parity line."""


@dataclass(frozen=True)
class PeerRow:
    """One side against the side under test; a ratio above 1 says that this side is slower."""

    title: str
    prefill: Comparison
    decode: Comparison
    parity: str


def peer_rows(record: RunRecord) -> list[PeerRow]:
    """One row a side of the headline case, in the record's order; empty without latency."""
    if not record.series:
        return []
    case, candidate = record.series[0].case, record.side("candidate")
    if candidate is None:
        return []
    rows = []
    for side in record.sides:
        prefill = compare(record, case, "ttft", side.label, candidate.label)
        decode = compare(record, case, "tpot", side.label, candidate.label)
        if prefill and decode:
            parity = {"candidate": "see the gate", "baseline": "the baseline"}.get(side.role)
            rows.append(PeerRow(side.title, prefill, decode, str(parity or side.details.get(PARITY, "not measured"))))
    return rows


def print_peers(rows: Sequence[PeerRow], skipped: dict[str, str], console: Console) -> None:
    """A table, and a line for each peer that could not take part."""
    title = "Peers, one interleaved run; x ours: above 1 is slower"
    table = plain_table(title, "side, and is it the same model?", "TTFT", "x ours", "TPOT", "x ours")
    for r in rows:
        said = Text.assemble(r.title, "\n", (f"  {r.parity}", "dim"))
        ttft, tpot = (f"{c.candidate.value * 1e3:.{digits}f} ms" for c, digits in ((r.prefill, 1), (r.decode, 2)))
        table.add_row(said, ttft, f"{r.prefill.ratio.value:.2f}", tpot, f"{r.decode.ratio.value:.2f}")
    console.print(table)
    for label, why in skipped.items():
        console.print(f"{label} skipped: {why}", highlight=False, markup=False)
