"""``llama-onnx matrix``: one exported folder under several ONNX Runtimes, and the version that changed it.

Try: ``llama-onnx matrix FOLDER --baseline demo --runtime onnxruntime==1.27.0,1.32.0 --mode quick --pairs 0``.
"""

from __future__ import annotations

import argparse
import datetime
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli.compare import command_of, parse_margins
from bench.cli.numbers import at_least
from bench.cli.output import ERR, Output, add_out, show, status
from bench.errors import BenchError, check_writable
from bench.progress import progress
from bench.runtimes import LIMIT_S
from export.manifest import require_folder
from export.source import add_option

if TYPE_CHECKING:
    from bench.matrix.rows import Rows, Side
    from bench.runtimes.environments import Runtime
    from reports.matrix import Bisection, Matrix

HELP = "under which ONNX Runtimes is this folder still the model, how fast is it there, and which version changed it?"
DEFAULT_CASES = "b1-p128-n32,b1-p512-n8"
LEAST_PAIRS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("folder", type=Path, help="the exported folder")
    add(
        "--baseline",
        metavar="MODEL",
        required=True,
        help="what it was exported from: 'demo', a checkpoint folder, a .gguf file or a hub id",
    )
    add_option(add)
    add(
        "--runtime",
        action="append",
        default=[],
        metavar="RUNTIMES",
        help="onnxruntime==1.23.2,1.27.0,1.32.0 (environments of about 125 MB each are made in the cache), "
        "onnxruntime-gpu==..., venv=PATH; may be repeated",
    )
    add(
        "--bisect",
        metavar="A..B",
        help="such as 1.22.1..1.23.2: find the first version after A that changed verdict or speed; A is the reference",
    )
    add("--reference", metavar="RUNTIME", help="what speed is compared with (default: this environment's)")
    add("--provider", default="cpu", metavar="NAMES", help="execution providers, such as cpu,cuda (default cpu)")
    add("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="of the provider; may be repeated")
    add("--session-option", action="append", default=[], metavar="KEY=VALUE", help="of the session; may be repeated")
    add("--threads", type=int, help="CPU threads of every side (default: every core)")
    add("--mode", default="standard", help="of the gate: quick, standard (default) or full")
    add("--dataset", help="your own texts: a JSONL file, hf:NAME, or own+FILE (default: the project's)")
    add("--cases", default=DEFAULT_CASES, help=f"batch size, prompt length, new tokens (default {DEFAULT_CASES})")
    add(
        "--pairs",
        type=int,
        default=LEAST_PAIRS,
        metavar="N",
        help="interleaved pairs of each case, 5 or more (default 5; half as many more if undecided); 0: no speed",
    )
    add("--rounds", type=at_least(2), default=4, metavar="N", help="generations measured in a process (default 4)")
    add("--margin", default="", help="how much slower passes as equal: 0.03, or ttft=0.05,tpot=0.02 (default 0.03)")
    add("--seed", type=int, metavar="N", help="of the order and the prompts")
    add(
        "--limit",
        type=at_least(1.0),
        default=LIMIT_S,
        metavar="S",
        help=f"stop one call after S seconds (default {LIMIT_S:g})",
    )
    add("--max-steal", type=at_least(0.0), default=0.02, metavar="SHARE", help="as in compare (default 0.02)")
    add("--max-others", type=at_least(0.0), default=0.10, metavar="SHARE", help="as in compare (default 0.10)")
    add("--wait", type=at_least(0.0), default=0, metavar="S", help="seconds to wait while something else measures here")
    add("--resume", action="store_true", help="continue the run in --out")
    add_out(parser, "folder of rows and page", "reports/out/matrix")


def runtimes_of(args: argparse.Namespace) -> tuple[Runtime, list[Runtime]]:
    """The reference and the others, all made; for ``--bisect`` its ends.

    Raises:
        BenchError: neither or both of ``--runtime`` and ``--bisect``, or one that cannot be installed.
    """
    from bench.matrix.bisect import parse_range
    from bench.runtimes.environments import here, parse_runtimes, prepare

    if bool(args.runtime) == bool(args.bisect):
        raise BenchError("give either --runtime onnxruntime==1.27.0,1.32.0 or --bisect 1.27.0..1.32.0")
    if args.bisect:
        if args.reference:
            raise BenchError("--bisect A..B compares with A; leave --reference out")
        first, last = parse_range(args.bisect)
        return prepare(first, status), [prepare(last, status)]
    asked = parse_runtimes(",".join(args.runtime))
    reference = here()
    if args.reference:
        named = parse_runtimes(args.reference, "--reference", "write onnxruntime==1.27.0, or venv=PATH")
        if len(named) != 1:
            raise BenchError("--reference names several runtimes; there can be one")
        reference = named[0]
    first, *others = [prepare(r, status) for r in (reference, *asked)]
    others = [r for r in others if r != first]
    if any(r.label == first.label for r in others):
        first = replace(first, note="reference")
    return first, others


def run(args: argparse.Namespace) -> int:
    """Measure the rows, judge, write the report, print; the exit code is the verdict's (0, 1 or 3)."""
    from bench.data.loading import load_dataset
    from bench.deployment import Deployment
    from bench.gate.modes import SEED
    from bench.gate.validate import make_subject, mode_of
    from bench.latency.paired_run import parse_case
    from bench.machine.lock import machine_lock
    from bench.machine.state import Limits
    from bench.matrix.rows import Plan, Rows, Side, refuse_earlier
    from reports.compare import Rules
    from reports.publish import write_report
    from reports.render.matrix_terminal import print_matrix, print_row
    from runtime.provider_options import parse_options
    from runtime.providers import PROVIDERS

    started = time.time()
    args.seed = SEED if args.seed is None else args.seed
    if args.pairs and args.pairs < LEAST_PAIRS:
        raise BenchError(f"--pairs {args.pairs} decides nothing; take {LEAST_PAIRS} or more, or 0 for no speed")
    providers = [p.strip() for p in args.provider.split(",") if p.strip()]
    if unknown := [p for p in providers if p not in PROVIDERS]:
        raise BenchError(f"unknown provider {unknown[0]!r}; choose from {', '.join(PROVIDERS)}")
    if args.bisect and len(providers) != 1:
        raise BenchError("--bisect looks at one provider; name one with --provider")
    margin, margins = parse_margins(args.margin)
    cases = tuple(dict.fromkeys(parse_case(c) for c in args.cases.split(",")))
    mode, dataset = mode_of(args.mode), load_dataset(args.dataset)
    check_writable(args.out)
    refuse_earlier(args.out, args.resume)
    require_folder(args.folder.expanduser())
    reference, others = runtimes_of(args)
    threads = {} if args.threads is None else {"threads": args.threads}
    where = Deployment(
        providers[0],
        provider_options=parse_options(args.provider_option),
        session_options=parse_options(args.session_option),
        runtime=reference,
        any_runtime=True,
        limit_s=args.limit,
        **threads,
    )
    subject = make_subject(
        args.folder, args.baseline, mode, dataset, where, status=status, keep=True, allow_pickle=args.allow_pickle
    )
    plan = Plan(
        reference=Side(reference, providers[0]),
        cases=cases if args.pairs else (),
        rules=Rules(planned=args.pairs, most=args.pairs + args.pairs // 2, margin=margin, margins=margins),
        seed=args.seed,
        rounds=args.rounds,
        limits=Limits(args.max_steal, args.max_others),
    )
    out = ERR if args.json else Output()
    sides = list(dict.fromkeys([plan.reference, *(Side(r, p) for r in (reference, *others) for p in providers)]))
    with machine_lock("llama-onnx matrix", args.wait, status), progress("matrix") as bar:
        rows = Rows(
            subject,
            plan,
            args.out,
            resume=args.resume,
            tick=bar.say,
            on_row=lambda row: print_row(row, out),
            command=tuple(command_of(args)),
        )
        try:
            bisection = _measure(rows, sides, args)
        finally:
            subject.close()
            subject.baseline.close()
    made = _document(rows, args, started, bisection)
    page = write_report(made, args.out)
    show(args, made, partial(print_matrix, made), f"page: {page.resolve()}")
    return made.exit_code


def _measure(rows: Rows, sides: list[Side], args: argparse.Namespace) -> Bisection | None:
    from bench.matrix.bisect import bisect

    if args.bisect:
        return bisect(rows, sides[0].runtime, sides[-1].runtime, sides[0].provider, status)
    for side in sides:
        rows.row(side)
    return None


def _document(rows: Rows, args: argparse.Namespace, started: float, bisection: Bisection | None) -> Matrix:
    from bench.latency.paired_run import case_key
    from bench.machine.environment import machine, versions
    from bench.matrix.rows import against_manifest
    from reports.matrix import Matrix, matrix_verdict

    s = rows.subject
    rows.complete_reference()
    measured = [rows.made[side] for side in sorted(rows.made, key=lambda side: (side.provider, side.runtime.key))]
    return Matrix(
        tool_version=versions().get("llama-onnx-bench", "unknown"),
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        duration_s=sum(r.seconds for r in measured) if args.resume else time.time() - started,
        command=command_of(args),
        folder=s.folder.resolve().name,
        folder_sha256=s.digest,
        oldest_runtime=s.manifest.oldest_runtime,
        baseline=f"{s.baseline.source.name} ({s.baseline.source.origin}), PyTorch fp32",
        baseline_sha256=s.baseline.digest,
        mode=s.mode.name,
        tier=s.terms.precision,
        dataset=s.dataset.name,
        reference=rows.plan.reference.runtime.label,
        cases=[case_key(c) for c in rows.plan.cases],
        pairs=rows.plan.rules.planned,
        seed=rows.plan.seed,
        rows=measured,
        bisection=bisection,
        verdict=matrix_verdict(measured),
        machine=machine(),
        versions=versions(),
        notes=against_manifest(measured, s.manifest.oldest_runtime),
    )
