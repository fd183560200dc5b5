"""A matrix in the terminal: a line a row, what is wrong below it, the bisection, the verdict last.

Try: ``llama-onnx report matrix.json``.
"""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from reports.matrix import Bisection, Difference, Matrix, MatrixRow
from reports.render import comparison_words as cw
from reports.render import matrix_words as mw
from reports.render import words
from reports.render.terminal import plain_table, print_end, style
from reports.verdict import WORDS

REASONS, OPERATORS = 5, 6


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print the table, each row's reasons, the bisection and the verdict. Names are text, never rich markup."""
    overview = mw.Overview(matrix)
    console.print(_table(overview))
    statuses = dict.fromkeys(r.status for row in matrix.rows for m in mw.SPEED for r in mw.speed_of(row, m))
    if statuses:
        several = "; of several cases the most pressing" if len(matrix.cases) > 1 else ""
        told = (
            f"Decode and prefill: time / that under {words.shorten(matrix.reference, 60)}, above 1 is slower{several}."
        )
        console.print(Text(told, style="dim"))
        console.print(Text("  ".join(f"{cw.LOOKS[s].glyph} {s.lower()}" for s in statuses), style="dim"))
    for row in matrix.rows:
        _details(row, overview, console)
    if matrix.bisection:
        _bisection(matrix.bisection, overview, console)
    console.print()
    for note in overview.notes[:20]:
        console.print(Text(f"note: {words.shorten(note, 400)}", style="dim"))
    about = f"{matrix.folder} against {matrix.baseline}; {overview.sure_line}; {words.duration(matrix.duration_s)}"
    console.print(Text(words.shorten(about, 600)))
    print_end(WORDS[matrix.verdict.outcome], overview.headline, console)


def print_row(row: MatrixRow, console: Console) -> None:
    """One line as a row ends, its first reason below it."""
    line = Text(f"{words.shorten(row.name, 60):<28} ")
    line.append(f"{row.verdict:<12} ", style=style(row.verdict))
    line.append(f"{row.seconds:6.1f} s  ", style="dim")
    speed = [f"{cw.metric_name(m)} {mw.pressing_ratio(row, m)}" for m in mw.SPEED if mw.speed_of(row, m)]
    line.append(", ".join([mw.parity_cell(row), *speed, *filter(None, [mw.warned(row)])]))
    console.print(line, soft_wrap=True)
    for reason in mw.row_reasons(row)[:1]:
        console.print(Text(f"  {words.shorten(reason, 400)}", style="dim"), soft_wrap=True)


def _table(overview: mw.Overview) -> Table:
    where = f", {words.shorten(overview.providers[0], 30)}" if len(overview.providers) == 1 else ""
    head = (mw.FAMILY if overview.plain else "Runtime", "verdict", "parity", "decode", "prefill", "load", "peak")
    table = plain_table(overview.title + where, *head)
    # A line a row at 100 columns; at 80 only the name of a failed check goes on below.
    table.padding = (0, 1, 0, 0)
    for i, column in enumerate(table.columns):
        column.justify = "left" if i < 3 else "right"
        column.no_wrap = i > 2 or i == 1 or (i == 0 and overview.plain)
    short = overview.plain and overview.matrix.pairs  # the ratios' cells say which is the reference
    for row in overview.matrix.rows:
        name = row.version if short else overview.short(row)
        table.add_row(
            Text(name if where else f"{name}, {words.shorten(row.provider, 30)}"),
            Text(row.verdict, style=style(row.verdict)),
            Text(mw.parity_cell(row)),
            *(Text(overview.ratio(row, m)) for m in mw.SPEED),
            mw.load_text(row),
            mw.peak_text(row),
        )
    return table


def _details(row: MatrixRow, overview: mw.Overview, console: Console) -> None:
    reasons = mw.row_reasons(row)
    told = [words.shorten(r, 400) for r in reasons[:REASONS]]
    told += [f"and {len(reasons) - REASONS} more reasons in the page"] * (len(reasons) > REASONS)
    told += [words.shorten(n, 400) for n in overview.notes_of(row)[:REASONS]]
    told += filter(None, [mw.warned(row)])
    if not told and row.difference is None:
        return
    console.print(Text.assemble(("\n" + words.shorten(row.name, 80), "bold"), "  ", (row.verdict, style(row.verdict))))
    for text in told:
        console.print(Padding(Text(text), (0, 0, 0, 2)))
    _difference(row.difference, console)


def _difference(found: Difference | None, console: Console) -> None:
    for text in mw.difference_lines(found) if found else []:
        # The path of the reproduction stays whole, to be copied.
        console.print(Text(f"  {words.shorten(text, 600)}"), soft_wrap=True)


def _bisection(found: Bisection, overview: mw.Overview, console: Console) -> None:
    console.print(Text.assemble(("\nBisection ", "bold"), mw.bisection_line(found)))
    console.print(Padding(Text(mw.sentence(found.summary)), (0, 0, 0, 2)))
    for row in overview.neighbours(found):
        speed = [f"{cw.metric_name(m)} {mw.pressing_ratio(row, m)}" for m in mw.SPEED if mw.speed_of(row, m)]
        line = Text.assemble(f"  {words.shorten(row.name, 60)}  ", (row.verdict, style(row.verdict)))
        line.append(f"  {', '.join([mw.parity_cell(row), *speed])}")
        console.print(line, soft_wrap=True)
    _difference(found.difference, console)
    if found.profile:
        title = f"Time by operator, {words.shorten(found.profiled, 60) or 'one run'}"
        heads = [words.shorten(v, 20) for v in (found.before, found.after)]
        table = plain_table(title, "Operator", *heads, "difference", "ratio")
        for t in found.profile[:OPERATORS]:
            table.add_row(*map(Text, mw.operator_cells(t)))
        console.print(table)
        if (cut := len(found.profile) - OPERATORS) > 0:
            console.print(Text(f"{cut} more operators are in the page.", style="dim"))
