"""``llama-onnx sweep FILE.yaml``: models x precisions x providers x batch x prompt, one process each, into one file.

Every process is a line of ``cases.jsonl`` as soon as it ends, so ``--resume`` continues. ``--ray`` measures on every
machine of a Ray cluster at once; files of machines that share no cluster are merged by ``--merge``, a machine's
fingerprint being part of what makes a record unique.

Try: ``echo "models: [demo]" > s.yaml; llama-onnx sweep s.yaml --out /tmp/s``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from bench.cli.numbers import at_least
from bench.cli.output import add_out, show, status

if TYPE_CHECKING:
    from reports.comparison import CaseRecord

HELP = "measure every combination in a YAML file: models, precisions, providers, batch and prompt sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, where records go, and on which machines."""
    add = parser.add_argument
    add("file", type=Path, help="the sweep, such as: models: [demo] (docs/sweeps.md)")
    add_out(parser, "folder of cases.jsonl", "reports/out/sweep")
    add("--resume", action="store_true", help="continue the sweep in --out")
    add("--ray", action="store_true", help="on every machine of the Ray cluster (RAY_ADDRESS) at once")
    add("--wait", type=at_least(0.0), default=0, metavar="S", help="seconds to wait while something else measures here")
    add("--merge", type=Path, nargs="+", default=[], metavar="JSONL", help="add the records of other machines")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, merge, print a table; 0, or 1 when a process failed."""
    from bench.latency.case_log import RECORDS, CaseLog
    from bench.latency.sweep import merge, parse_sweep
    from bench.latency.sweep_measure import measure_here, measure_on_machines, own_precision
    from bench.machine.lock import machine_lock
    from reports.base import read_text
    from reports.case_files import read_records
    from reports.publish import write_atomically

    sweep = parse_sweep(read_text(args.file), str(args.file))
    for model in sweep.models:
        if (own := own_precision(model)) and sweep.precisions != (own,):
            status(f"{model} is exported in {own} and is measured in that alone")
    others = [read_records(p) for p in args.merge]
    log = CaseLog(args.out, args.resume)
    try:
        if args.ray:
            measure_on_machines(sweep, log, args.wait, status)
        else:
            with machine_lock("llama-onnx sweep", args.wait, status):
                measure_here(sweep, log, status)
    finally:  # what was measured is shown, whatever ended it
        records = merge([log.records, *others])
        if args.merge:
            write_atomically(args.out / "merged.jsonl", "".join(r.model_dump_json() + "\n" for r in records))
        file = args.out / ("merged.jsonl" if args.merge else RECORDS)
        if records:
            show(args, [r.model_dump() for r in records], _table(records), f"records: {file.resolve()}")
    return 1 if any(r.outcome not in ("ok", "invalid") for r in records) else 0


def _table(records: Sequence[CaseRecord]) -> Table:
    columns = ("machine", "case", "processes", "TTFT ms", "TPOT ms", "not counted")
    table = Table(*columns, title="Medians over processes", title_justify="left")
    keys = dict.fromkeys((r.fingerprint or "", r.case) for r in records)
    for fingerprint, case in keys:
        own = [r for r in records if (r.fingerprint or "", r.case) == (fingerprint, case)]
        ok = [r for r in own if r.outcome == "ok"]
        cells = [fingerprint[:8], case, f"{len(ok)} of {len(own)}"]
        for metric in ("ttft", "tpot"):
            values = [statistics.median(r.metrics[metric]) for r in ok if metric in r.metrics]
            cells.append(f"{1e3 * statistics.median(values):.2f}" if values else "")
        cells.append("; ".join(dict.fromkeys(r.reason for r in own if r.reason)))
        table.add_row(*(Text(c) for c in cells))
    return table
