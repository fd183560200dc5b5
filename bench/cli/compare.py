"""``llama-onnx compare``: two sides measured in interleaved pairs, or two files of records, judged into one verdict.

Try: ``llama-onnx compare --base OUT --candidate OUT,threads=1 --cases b1-p32-n16 --out /tmp/compared``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bench.cli.numbers import at_least
from bench.cli.output import add_out, show, status
from bench.errors import BenchError, last_line
from bench.progress import progress
from export.source import add_option

if TYPE_CHECKING:
    from bench.latency.paired_run import Turns
    from bench.latency.sides import SideSpec
    from reports.compare import Rules
    from reports.comparison import Comparison
    from reports.validation import Validation

HELP = (
    "is the candidate faster or slower than the base? Measures both in interleaved pairs, or reads two files of records"
)
DEFAULT_CASES = "b1-p128-n32,b4-p128-n32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    form = "FOLDER[,provider=cpu][,threads=2][,option:KEY=VALUE][,runtime=onnxruntime==1.27.0][,venv=PATH][,rev=GITREV]"
    add(
        "files",
        nargs="*",
        type=Path,
        help="BASE CANDIDATE: two files instead of measuring (JSON Lines of cases, comparison.json, record.json, or "
        "pytest-benchmark's JSON)",
    )
    for side in ("base", "candidate"):
        add(
            f"--{side}-files",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help=f"the same, several of the {side}: a file of pytest-benchmark is one process, and 5 a side decide",
        )
    add("--base", metavar="SIDE", help=f"the reference: {form}")
    add("--candidate", metavar="SIDE", help="the side under test, in the same form")
    add(
        "--pairs",
        type=int,
        default=10,
        metavar="N",
        help="pairs of each case (default 10); half as many more if undecided",
    )
    add("--cases", default=DEFAULT_CASES, help=f"batch size, prompt length, new tokens (default {DEFAULT_CASES})")
    add("--rounds", type=at_least(1), default=10, metavar="N", help="generations measured in each process (default 10)")
    add(
        "--turns",
        choices=("auto", "rounds", "processes"),
        default="auto",
        help="what alternates in a pair: rounds while both processes are alive (twice the memory, a third of the noise "
        "on a shared machine), or whole processes; auto: rounds on the CPU where both models fit",
    )
    add(
        "--margin",
        default="",
        help="how much slower passes as equal: 0.03, or by metric: ttft=0.05,tpot=0.02 (default 0.03)",
    )
    add(
        "--gate",
        metavar="METRICS",
        help="metrics that decide the verdict (default ttft,tpot, or all of files that hold neither); total, load and "
        "peak_memory are reported",
    )
    add(
        "--model",
        help="the candidate's checkpoint: also decide whether it is still that model ('demo', a folder, .gguf, hub id)",
    )
    add_option(add)
    add("--mode", default="standard", help="with --model: quick, standard (default) or full")
    add(
        "--expect",
        metavar="KEY=VALUE,...",
        help="with --model: what the candidate has to be: precision, target, method (default: the folder's manifest)",
    )
    add("--dataset", help="with --model: a JSONL file, hf:NAME, or own+FILE (default: the project's)")
    add("--seed", type=int, metavar="N", help="of the order and the prompts")
    add("--limit", type=at_least(1.0), default=600.0, metavar="S", help="stop a process after S seconds (default 600)")
    add(
        "--max-steal",
        type=at_least(0.0),
        default=0.02,
        metavar="SHARE",
        help="repeat a pair if the hypervisor took more of the CPU time (default 0.02)",
    )
    add("--max-others", type=at_least(0.0), default=0.10, metavar="SHARE", help="by other processes (default 0.10)")
    add("--wait", type=at_least(0.0), default=0, metavar="S", help="seconds to wait while something else measures here")
    add("--resume", action="store_true", help="continue the run in --out")
    add_out(parser, "folder of records and page", "reports/out/compare")


def parse_margins(text: str) -> tuple[float, dict[str, float]]:
    """``0.03`` or ``ttft=0.05,tpot=0.02`` -> (the others' margin, by metric).

    Raises:
        BenchError: not such a list, or outside 0 to 1.
    """
    common, by_metric = 0.03, {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < 1:
            raise BenchError(f"--margin {part!r} is not a share; write 0.03, or ttft=0.05,tpot=0.02")
        if equals:
            by_metric[name] = number
        else:
            common = number
    return common, by_metric


def rules_of(args: argparse.Namespace) -> Rules:
    """The rules that the arguments fix.

    Raises:
        BenchError: fewer than 5 pairs, a margin of another form.
    """
    from reports.compare import Rules

    if args.pairs < 5:
        raise BenchError(f"--pairs {args.pairs} decides nothing; take 5 or more (10 finds 5 % at 1.5 % noise)")
    margin, margins = parse_margins(args.margin)
    gating = None if args.gate is None else tuple(g.strip() for g in args.gate.split(",") if g.strip())
    return Rules(planned=args.pairs, most=args.pairs + args.pairs // 2, margin=margin, margins=margins, gating=gating)


def turns_of(asked: str, base: SideSpec, candidate: SideSpec) -> Turns:
    """What alternates in a pair. ``auto`` looks at nothing that changes while a run may be resumed."""
    import psutil

    if asked in ("rounds", "processes"):
        return cast("Turns", asked)
    sides = (base, candidate)
    held = sum(f.stat().st_size for s in sides for f in Path(s.folder).expanduser().rglob("*") if f.is_file())
    fits = 1.5 * held < psutil.virtual_memory().total
    return "rounds" if fits and all(s.provider == "cpu" for s in sides) else "processes"


def _measured(args: argparse.Namespace, started: float) -> Comparison:
    from bench.latency.judged import judged_document
    from bench.latency.paired_run import PairedRun, Plan, parse_case
    from bench.latency.sides import parse_side
    from bench.machine.environment import machine
    from bench.machine.lock import machine_lock
    from bench.machine.state import Limits
    from reports.comparison import METRICS

    if args.expect:
        from bench.gate.validate import expected  # torch

        expected(args.expect)  # refused before anything is measured
    base, candidate = parse_side("base", args.base, status), parse_side("candidate", args.candidate, status)
    plan = Plan(
        base=base,
        candidate=candidate,
        cases=tuple(dict.fromkeys(parse_case(c) for c in args.cases.split(","))),
        seed=args.seed,
        rules=rules_of(args),
        rounds=args.rounds,
        limit_s=args.limit,
        limits=Limits(args.max_steal, args.max_others),
        turns=turns_of(args.turns, base, candidate),
    )
    if args.model and plan.candidate.revision:
        raise BenchError("--model gates parity with this revision of the suite: leave it out for a candidate with rev=")
    if unknown := [m for m in plan.rules.gating or () if m not in METRICS]:
        raise BenchError(f"--gate {unknown[0]} is not measured here; choose from {', '.join(METRICS)}")
    here = machine()
    run = PairedRun(plan, args.out, args.resume, here.fingerprint)
    with machine_lock("llama-onnx compare", args.wait, status):
        with progress("pairs", 2 * plan.rules.planned * len(plan.cases)) as bar:
            records = run.measure(bar.tick)
        validation = measure_parity(args, plan.candidate) if args.model else None
    return judged_document(
        plan,
        records,
        command=command_of(args),
        machine=here,
        duration_s=sum(r.duration_s or 0.0 for r in records) if args.resume else time.time() - started,
        validation=validation,
    )


def command_of(args: argparse.Namespace) -> list[str]:
    """The exact command to repeat it, from the same folder: the seed is always there, paths below it are relative."""
    here = f"{Path.cwd()}/"
    typed = [re.sub(f"(^|=){re.escape(here)}", r"\1", str(a)) for a in args.typed]
    return ["llama-onnx", *typed, *([] if "--seed" in typed else ["--seed", str(args.seed)])]


def measure_parity(args: argparse.Namespace, candidate: SideSpec) -> Validation:
    """The gate over the candidate: ``llama-onnx validate`` in a process of its own, its page below ``--out``.

    Raises:
        BenchError: the gate could not be run to its end; its last line is quoted.
    """
    from reports.validation import Validation

    out = args.out / "validation"
    document = out / "validation.json"
    document.unlink(missing_ok=True)  # an earlier run's is no result of this one
    command = [sys.executable, "-m", "bench.cli", "validate", candidate.folder, "--baseline", args.model]
    command += ["--mode", args.mode, "--out", str(out), *candidate.as_options()]
    command += ["--dataset", args.dataset] if args.dataset else []
    command += ["--allow-pickle"] if args.allow_pickle else []
    command += ["--expect", args.expect] if args.expect else []
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    # Python ends with 1 after any traceback, so the code alone is no verdict.
    found = Validation.read(document) if document.is_file() else None
    if found is None or found.exit_code != done.returncode:
        raise BenchError(f"the gate could not be run (exit code {done.returncode}): {last_line(done.stderr)}")
    return found


def files_of(args: argparse.Namespace) -> tuple[list[Path], list[Path]] | None:
    """The files of base and candidate; None where both sides are measured.

    Raises:
        BenchError: neither, or some of both.
    """
    named = args.base_files, args.candidate_files
    if args.base and args.candidate and not (args.files or any(named)):
        return None
    if not (args.base or args.candidate):
        if len(args.files) == 2 and not any(named):
            return args.files[:1], args.files[1:]
        if all(named) and not args.files:
            return named
    raise BenchError(
        "give either --base SIDE --candidate SIDE, or two files (BASE.jsonl CANDIDATE.jsonl), or several a side with "
        "--base-files and --candidate-files"
    )


def _from_files(args: argparse.Namespace, sides: tuple[list[Path], list[Path]], started: float) -> Comparison:
    from bench.machine.environment import versions
    from reports.case_files import read_any
    from reports.unpaired import compare_files

    base, candidate = sides
    names = [p.name for p in (base[0], candidate[0])]
    if names[0] == names[1]:
        names = [f"{p.absolute().parent.name}/{p.name}" for p in (base[0], candidate[0])]
    names = [f"{n} and {len(s) - 1} more" if len(s) > 1 else n for n, s in zip(names, sides, strict=True)]
    return compare_files(
        read_any(*base, side="base"),
        read_any(*candidate, side="candidate"),
        rules_of(args),
        labels=(names[0], names[1]),
        command=command_of(args),
        versions=versions(),
        started=started,
    )


def run(args: argparse.Namespace) -> int:
    """Measure or read, judge, write the report, print; the exit code is the verdict's (0, 1 or 3)."""
    from bench.gate.modes import SEED

    started = time.time()
    args.seed = SEED if args.seed is None else args.seed
    sides = files_of(args)
    if args.expect and (sides or not args.model):
        raise BenchError("--expect is a demand on parity, which is looked at with --base, --candidate and --model only")
    made = _from_files(args, sides, started) if sides else _measured(args, started)
    from reports.publish import write_report
    from reports.render.comparison_terminal import print_comparison

    page = write_report(made, args.out)
    show(args, made, partial(print_comparison, made), f"page: {page.resolve()}")
    return made.verdict.exit_code
