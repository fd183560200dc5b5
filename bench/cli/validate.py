"""The body of ``llama-onnx validate``: options in, lines and an exit code out.

Try: ``llama-onnx validate --list-checks``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bench import deployment
from bench.errors import BenchError

if TYPE_CHECKING:
    from bench.gate.subject import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("folder", type=Path, nargs="?", help="the exported folder")
    parser.add_argument("--baseline", metavar="MODEL", help="'demo', a checkpoint folder, a .gguf file or a hub id")
    parser.add_argument(
        "--mode", default="standard", help="quick (under a minute), standard (default) or full (every text and item)"
    )
    parser.add_argument(
        "--expect",
        metavar="KEY=VALUE,...",
        help="what the folder has to be: precision, target, method; else its manifest says, and so its margins",
    )
    parser.add_argument("--only", metavar="CHECK,...", help="run these checks alone")
    parser.add_argument("--list-checks", action="store_true", help="name the checks and what each catches")
    parser.add_argument(
        "--dataset",
        help="your own texts: a JSONL file (bench/data/README.md), or hf:NAME[:CONFIG]; own+FILE adds to the project's",
    )
    parser.add_argument(
        "--localize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a FAIL of the numbers name the layer and operator (default)",
    )
    deployment.add_options(parser.add_argument)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, GPUs or machines that share windows and generations (Ray)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("reports/out/validate"),
        help="folder of the page and the JSON",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute the baseline anew and keep nothing of it")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="write an in-toto statement of the result there"
    )
    parser.add_argument(
        "--allow-quick", action="store_true", help="certify a run in mode quick; the certificate says so"
    )
    parser.add_argument("--key", type=Path, help="sign the certificate with this private key (PEM, see keygen)")


def run(args: argparse.Namespace) -> int:
    """List, or validate; the verdict's exit code.

    Raises:
        BenchError: no folder or baseline given, or names that are not known.
    """
    if args.list_checks:
        return _list(args.json)
    if args.folder is None or not args.baseline:
        raise BenchError("give the exported folder and --baseline MODEL (a checkpoint folder, or 'demo')")
    if args.certificate and (args.only or (args.mode == "quick" and not args.allow_quick)):
        raise BenchError("a certificate stands for every check in mode standard or full; --allow-quick takes quick too")
    from bench.data.loading import load_dataset
    from bench.deployment import Deployment
    from bench.gate.validate import chosen_checks, expected, make_subject, mode_of, validate
    from bench.process.workers import cluster
    from reports.publish import write_validation
    from reports.render.validation import print_check, print_verdict

    specs, mode = chosen_checks(args.only), mode_of(args.mode)
    err = Console(stderr=True)
    out = err if args.json else Console()
    dataset = load_dataset(args.dataset)
    subject = make_subject(
        args.folder,
        args.baseline,
        mode,
        dataset,
        Deployment.of(args),
        status=lambda m: err.print(m, style="dim", markup=False),
        keep=not args.no_cache,
        workers=args.workers,
        expect=expected(args.expect),
    )
    with _watched(subject, err):
        try:
            with cluster(args.workers):
                found = validate(
                    subject, specs, args.localize, lambda r: print_check(r, out), ["llama-onnx", *args.typed]
                )
        finally:
            subject.close()
            subject.baseline.close()
    print_verdict(found, out)
    page = write_validation(found, args.out)
    out.print(f"page: {page.resolve()}", markup=False, highlight=False, soft_wrap=True)
    subject.finish()
    if args.json:
        sys.stdout.write(found.to_json())
    if args.certificate:
        from bench.certificate.envelope import seal
        from bench.certificate.statement import make_certificate
        from bench.cli.certify import write_certificate

        statement = make_certificate(
            found, args.folder, subject.baseline.checkpoint, dataset, allow_quick=args.allow_quick
        )
        write_certificate(args.certificate, seal(statement, args.key))
        signed = "signed" if args.key else "NOT signed (no --key)"
        out.print(f"{args.certificate}: mode {found.mode}, {signed}", markup=False)
    return found.exit_code


@contextmanager
def _watched(subject: Subject, console: Console) -> Iterator[None]:
    """A line with what is being done, time gone, and bar and time left where the number of units is known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading the folder", total=None)
        stage = 0

        def progress(done: int, total: int) -> None:
            nonlocal stage, task
            if total != stage:  # another stage has another speed; rich cannot take a total back
                said = bar.tasks[0].description
                bar.remove_task(task)
                stage, task = total, bar.add_task(said, total=total or None, completed=done)
            bar.update(task, completed=done)

        subject.tick = lambda message: bar.update(task, description=message)
        subject.progress = progress
        yield


def _list(as_json: bool) -> int:
    from bench.gate.registry import CHECKS

    if as_json:
        rows = [{"name": c.name, "kind": c.kind, "looks_at": c.looks_at, "catches": c.catches} for c in CHECKS]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    table = Table(title="Checks, in the order in which they run", title_justify="left")
    for column in ("check", "kind", "looks at", "catches"):
        table.add_column(column)
    for c in CHECKS:
        table.add_row(c.name, c.kind, Text(c.looks_at), Text(c.catches))
    Console().print(table)
    return 0
