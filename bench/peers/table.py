"""The peers' table: ratios to the side under test, each beside its parity."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from reports.record import RunRecord
from reports.render.terminal import plain_table
from reports.stats import compare

PARITY = "parity"
"""Key of a side's details that holds its parity line."""


def print_peers(record: RunRecord, skipped: dict[str, str], console: Console) -> None:
    """The sides of the headline case in the record's order, and a line for each peer that could not take part."""
    title = "Peers, one interleaved run; x ours: above 1 is slower"
    table = plain_table(title, "side, and is it the same model?", "TTFT", "x ours", "TPOT", "x ours")
    candidate = record.side("candidate")
    for side in record.sides if record.series else ():
        ours, case = candidate.label if candidate else "", record.series[0].case
        prefill, decode = (compare(record, case, metric, side.label, ours) for metric in ("ttft", "tpot"))
        if prefill and decode:
            parity = {"candidate": "see the gate", "baseline": "the baseline"}.get(side.role)
            parity = parity or str(side.details.get(PARITY, "not measured"))
            ttft, tpot = f"{prefill.candidate.value * 1e3:.1f} ms", f"{decode.candidate.value * 1e3:.2f} ms"
            ratios = [f"{c.ratio.value:.2f}" for c in (prefill, decode)]
            said = Text.assemble(side.title, "\n", (f"  {parity}", "dim"))
            table.add_row(said, ttft, ratios[0], tpot, ratios[1])
    console.print(table)
    for label, why in skipped.items():
        console.print(f"{label} skipped: {why}", highlight=False, markup=False)
