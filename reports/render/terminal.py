"""The summary at the end of a run: rich tables that fit 80 columns, the verdict last, where the eye is.

Try: ``python -c "import pathlib, rich.console as c, reports.record as r, reports.render.terminal as t;
t.print_summary(r.RunRecord.read(pathlib.Path('reports/out/record.json')), c.Console())"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports.record import RunRecord
from reports.render import words
from reports.stats import Metric
from reports.summary import (
    LatencyRow,
    floor_rows,
    headline_case,
    latency_rows,
    load_rows,
    memory_rows,
    prefill_cases,
    prefill_limit,
    prefill_rows,
)
from reports.targets import Target
from reports.validation import Validation
from reports.verdict import judge, speed_sentence

COLOURS = {"fail": "bold red", "open": "yellow", "pass": "green", "plain": "dim"}
"""Style of a tone."""


def style(word: str) -> str:
    """Style of a status word."""
    return COLOURS[words.tone(word)]


def print_end(word: str, headline: str, console: Console) -> None:
    """The verdict, the last line of a run or a comparison."""
    console.print(Text.assemble((word, f"bold {style(word)}"), f": {words.clean(headline)}"))


def print_summary(record: RunRecord, console: Console) -> None:
    """Print latency, parity, targets, memory, warnings and the verdict. Names are text, never rich markup."""
    verdict = judge(record)
    if rows := latency_rows(record):
        console.print(latency_table(rows))
        counts = sorted({r.rounds for r in rows})
        rounds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        note = f"Medians of {rounds} rounds; x: times as fast as the baseline, 95 % interval below it."
        console.print(Text(note, style="dim"))
    else:
        console.print("Latency: not measured.")
    for table in (floor_table(record), prefill_table(record), memory_table(record), targets_table(verdict.targets)):
        if table is not None:
            console.print()
            console.print(table)
    print_parity(record.validation, console)
    for r in record.validation.of("FAIL", "INCONCLUSIVE", "SUSPICIOUS") if record.validation else []:
        console.print(Text.assemble((r.status, style(r.status)), f" {r.title}: {words.shorten(r.reason, 300)}"))
    console.print()
    if record.model.random_weights:
        console.print(Text("RANDOM WEIGHTS: answers and task scores mean nothing.", style="bold yellow"))
    print_warnings(verdict.warnings, console)
    if verdict.not_examined:
        console.print(Text(f"not examined: {', '.join(verdict.not_examined)}", style="dim"))
    console.print(Text(f"speed: {speed_sentence(verdict.speed)}"))
    print_end(verdict.word, verdict.headline, console)


def latency_table(rows: list[LatencyRow]) -> Table:
    """Medians and speed-ups of every case and side, the interval of a speed-up below it."""
    table = plain_table("Latency", "Side", "TTFT ms", "prefill", "TPOT ms", "decode", "tok/s")
    case = None
    for r in rows:
        if r.case != case:
            case = r.case
            table.add_section()
            table.add_row(Text(case.label, style="bold"))
        table.add_row(
            Text(words.shorten(r.side.title, 30)),
            words.median_ms(r.times["ttft"]),
            _gain(r, "ttft"),
            words.median_ms(r.times["tpot"]),
            _gain(r, "tpot"),
            words.fixed(r.tokens_per_s) if r.tokens_per_s else words.DASH,
        )
    return table


def floor_table(record: RunRecord) -> Table | None:
    """Multiples of the memory floor on the headline case."""
    case = headline_case(record)
    rows = floor_rows(record, case) if case else []
    if case is None or not rows:
        return None
    table = plain_table(f"Distance to the memory floor, {case.label}", "Side", "TPOT", "x floor")
    for r in rows:
        table.add_row(Text(words.shorten(r.side.title, 40)), words.ms(r.tpot.value), words.fixed(r.multiple.value))
    return table


def prefill_table(record: RunRecord) -> Table | None:
    """Prompt tokens per second by prompt length, each side's TTFT as a multiple of the matrix-product floor below."""
    rows, cases = prefill_rows(record), prefill_cases(record)
    if not rows:
        return None
    limits = [prefill_limit(record, c) for c in cases]
    more = ", x floor below" if any(limits) else ""
    title = f"Prefill, tokens/s by prompt length{more}, batch {cases[0].batch}"
    table = plain_table(title, "Side", *(f"{c.prompt:,}" for c in cases))
    for side, cells in rows:
        told = [
            words.fixed(e.tokens_per_s.value) + (f"\n{words.fixed(e.multiple.value)}x" if e.multiple else "")
            if e
            else words.DASH
            for e in cells
        ]
        table.add_row(Text(words.shorten(side.title, 34)), *told)
    if any(limits):
        table.add_row("Matrix-product floor", *(words.fixed(limit) if limit else words.DASH for limit in limits))
    return table


def memory_table(record: RunRecord) -> Table | None:
    """Peak memory and load time of each side."""
    loads = {side.label: e for side, e in load_rows(record)}
    rows = memory_rows(record)
    if not rows:
        return None
    table = plain_table("Memory and load", "Side", "peak", "model's part", "load")
    for side, memory in rows:
        load = loads.get(side.label)
        table.add_row(
            Text(words.shorten(side.title, 34)),
            words.size(memory.peak_bytes),
            words.size(memory.own_bytes),
            words.ms(load.value if load else None),
        )
    return table


def print_warnings(lines: Sequence[str], console: Console) -> None:
    """One line each."""
    for line in lines:
        console.print(Text.assemble(("warning: ", "yellow"), words.shorten(line, 400)))


def print_parity(validation: Validation | None, console: Console) -> None:
    """One line for every check and task metric, or that nothing was examined."""
    console.print()
    if validation is None:
        console.print("Parity: not examined.")
        return
    title = f"Parity, tolerance tier {words.shorten(validation.tier, 30)}, mode {words.shorten(validation.mode, 30)}"
    table = plain_table(title, "Check", "bound", "limit", "status")
    for r in validation.results:
        m = r.measurements[0] if r.measurements else None
        held = (m.bound if m.bound is not None else m.value) if m else None
        table.add_row(
            Text(words.shorten(r.title, 32)),
            Text(words.shorten(words.number(held, m.unit, m.limit), 16) if m else words.DASH),
            Text(words.shorten(words.limit_text(m.limit, m.better, m.unit), 16) if m else words.DASH),
            Text(r.status, style=style(r.status)),
        )
    for t in validation.tasks:
        table.add_row(
            Text(words.shorten(f"{t.task}: {t.metric}", 32)),
            words.difference(t.difference_bound),
            words.difference(t.limit),
            Text("; ".join(filter(None, (t.status, t.would_decide))), style=style(t.status)),
        )
    console.print(table)


def targets_table(targets: Sequence[Target]) -> Table | None:
    """The project's targets and what was measured."""
    if not targets:
        return None
    table = plain_table("Targets", "Target", "limit", "measured", "")
    for t in targets:
        word = "MET" if t.met else "MISSED"
        table.add_row(t.name, words.target_limit(t), words.fixed(t.value), Text(word, style=style(word)))
    return table


def plain_table(title: str, *columns: str) -> Table:
    """A table that fits 80 columns: first column to the left, the others to the right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(title),
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1),
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _gain(row: LatencyRow, metric: Metric) -> str:
    estimate = row.gains[metric]
    if row.side.role == "baseline":
        return "1" if row.times[metric] else words.DASH
    if estimate is None:
        return words.DASH
    interval = words.interval(estimate)
    return f"{words.fixed(estimate.value)}x" + (f"\n{interval.strip('[]').replace(', ', '-')}" if interval else "")
