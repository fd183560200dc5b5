"""A comparison in the terminal: what moved and what is open as a table of 80 columns, the verdict last.

Try: ``llama-onnx report comparison.json``.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports.comparison import Comparison
from reports.comparison_summary import Digest
from reports.render import comparison_words as cw
from reports.render import parity, words
from reports.render.terminal import COLOURS, plain_table, print_end, print_parity, print_warnings
from reports.verdict import WORDS

ROWS = 40


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print results, parity, warnings and the verdict. Names are text, never rich markup."""
    digest = Digest(comparison)
    console.print(results_table(digest))
    if (cut := len(comparison.results) - ROWS) > 0:
        console.print(Text(f"{cut:,} less pressing results are in the page.", style="dim"))
    print_parity(comparison.validation, console)
    console.print()
    print_warnings(comparison.warnings[:20], console)
    if comparison.advisory_reason:
        console.print(Text.assemble(("advice only: ", "yellow"), words.shorten(comparison.advisory_reason, 400)))
    elif comparison.verdict.outcome == "INCONCLUSIVE":
        for reason in comparison.verdict.reasons[:5]:
            console.print(Text.assemble(("undecided: ", "yellow"), words.shorten(reason, 400)))
    counts = ", ".join(f"{n:,} {s.lower()}" for s, n in digest.counts.items() if n)
    console.print(Text(f"{counts or 'no results'}; {cw.sure_line(comparison)}"))
    print_end(WORDS[comparison.verdict.outcome], cw.headline(digest), console)


def results_table(digest: Digest) -> Table:
    """The most pressing results; a speed-up carries its parity."""
    table = plain_table("Candidate against base", "Case", "metric", "change", "95 % interval", "pairs", "status")
    for r in digest.by_importance[:ROWS]:
        status = Text(f"{cw.LOOKS[r.status].glyph} {r.status}", style=COLOURS[cw.tone(r.status, digest)])
        if r.status == "IMPROVED":
            status.append(f"\n{parity.short(digest.comparison.validation)}", style="dim")
        table.add_row(
            Text(words.shorten(r.case, 30)),
            Text(words.shorten(cw.metric_name(r.metric), 14)),
            cw.signed(r.ratio),
            cw.signed_interval(r),
            f"{r.valid_pairs}/{r.pairs_needed}" if r.pairs_needed else str(r.valid_pairs),
            status,
        )
    return table
