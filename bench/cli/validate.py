"""``llama-onnx validate``: named checks of a folder against its baseline, and one verdict.

Try: ``llama-onnx validate --list-checks``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table
from rich.text import Text

from bench import deployment
from bench.cli.certify import add_certificate, refuse_inside, write_certificate
from bench.cli.output import ERR, Output, add_out, show, status, write_json
from bench.errors import BenchError, check_writable
from bench.progress import progress
from export.source import add_option

HELP = "is this exported folder still the model? Runs named checks and gives a verdict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="the exported folder")
    add(
        "--baseline",
        metavar="MODEL",
        help="what it was exported from: 'demo', a checkpoint folder, a .gguf file or a hub id",
    )
    add_option(add)
    add("--mode", default="standard", help="quick (under a minute), standard (default) or full (every text and item)")
    add(
        "--expect",
        metavar="KEY=VALUE,...",
        help="what you asked for: precision, target, method (default: the folder's manifest); it decides the margins",
    )
    add("--only", metavar="CHECK,...", help="run only these checks")
    add("--list-checks", action="store_true", help="list the checks and what each catches")
    add(
        "--dataset",
        help="your own texts in place of the project's: a JSONL file (bench/data/README.md) or hf:NAME[:CONFIG]; "
        "own+FILE adds a file to the project's",
    )
    add(
        "--localize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where a numeric check fails, find the layer and operator where it begins (default)",
    )
    add("--sm", default="89", metavar="N,...", help="GPUs that tensorrt_compile builds engines for (default 89)")
    deployment.add_options(parser.add_argument)
    add(
        "--runtime",
        metavar="RUNTIME",
        help="another ONNX Runtime: onnxruntime==1.23.2 (an environment is made in the cache) or venv=PATH; it needs "
        "onnxruntime and numpy only",
    )
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes, GPUs or machines that share the work, through Ray (default 1)",
    )
    add_out(parser, "folder of the page and the JSON", "reports/out/validate")
    add("--no-cache", action="store_true", help="compute the baseline anew and do not keep it")
    add_certificate(parser)


def run(args: argparse.Namespace) -> int:
    """List, or validate; the verdict's exit code.

    Raises:
        BenchError: no folder or baseline given, or names that are not known.
    """
    if args.list_checks:
        return _list(args)
    if args.folder is None or not args.baseline:
        raise BenchError("give the exported folder and --baseline MODEL (a checkpoint folder, or 'demo')")
    if args.certificate and (args.only or (args.mode == "quick" and not args.allow_quick)):
        raise BenchError("a certificate stands for every check in mode standard or full; --allow-quick takes quick too")
    from bench.data.loading import load_dataset
    from bench.deployment import Deployment
    from bench.gate.validate import chosen_checks, expected, make_subject, mode_of, validate
    from bench.process.workers import cluster
    from reports.publish import write_report
    from reports.render.validation import print_check, print_verdict
    from runtime.trt_compiler import parse_sms

    folder = args.folder.expanduser()
    if args.certificate:
        refuse_inside(args.certificate, folder)
    specs, mode = chosen_checks(args.only), mode_of(args.mode)
    out = ERR if args.json else Output()
    dataset = load_dataset(args.dataset)
    subject = make_subject(
        folder,
        args.baseline,
        mode,
        dataset,
        Deployment.of(args),
        status=status,
        keep=not args.no_cache,
        workers=args.workers,
        expect=expected(args.expect),
        allow_pickle=args.allow_pickle,
        sms=parse_sms(args.sm),
    )
    check_writable(args.out)
    with progress("validate") as bar:
        bar.say("reading the folder")
        subject.tick, subject.progress = bar.say, bar.at
        try:
            with cluster(args.workers):
                found = validate(
                    subject, specs, args.localize, lambda r: print_check(r, out), ["llama-onnx", *args.typed]
                )
        finally:
            subject.close()
            subject.baseline.close()
    print_verdict(found, out)
    page = write_report(found, args.out)
    out.print(f"page: {page.resolve()}", markup=False, highlight=False, soft_wrap=True)
    subject.finish()
    if args.json:
        write_json(found)
    if args.certificate:
        from bench.certificate.statement import CertificateError, make_certificate

        try:
            statement = make_certificate(
                found, folder, subject.baseline.checkpoint, dataset, allow_quick=args.allow_quick
            )
        except CertificateError as error:
            if found.exit_code == 0:
                raise
            status(f"no certificate: {error}")  # the verdict is the answer
        else:
            out.print(write_certificate(statement, args), markup=False, soft_wrap=True)
    return found.exit_code


def _list(args: argparse.Namespace) -> int:
    from bench.gate.registry import CHECKS

    title = "Checks, in the order in which they run"
    table = Table("check", "kind", "looks at", "catches", title=title, title_justify="left")
    rows = [{"name": c.name, "kind": c.kind, "looks_at": c.looks_at, "catches": c.catches} for c in CHECKS]
    for row in rows:
        table.add_row(*map(Text, row.values()))
    show(args, rows, table)
    return 0
