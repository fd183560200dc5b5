"""The command line, ``llama-onnx COMMAND``; ``llama-onnx --help`` lists the commands.

``--json`` puts one JSON document on standard output and everything else on standard error. Exit codes: 0 passed,
1 a gate failed, 2 wrong input, 3 inconclusive, 4 this machine cannot run what was asked. Heavy libraries are imported
by the command that needs them, so that ``--help`` and ``report`` start at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bench.cli.generate import add_generate_options
from bench.errors import user_error

ERR = Console(stderr=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-onnx", description="The gate before an ONNX export of a LLaMA ships: latency and parity."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="one JSON document on standard output")
        sub.set_defaults(run=run)
        return sub

    add("demo-model", _demo_model, "fetch the built-in demo model into the cache and print its folder")

    export = add("export", _export, "export a checkpoint: fused attention, KV cache, one folder")
    export.add_argument("model", help="'demo', a checkpoint folder, a .gguf file or a hub id")
    export.add_argument("out", type=Path, help="the folder to make")
    export.add_argument("--precision", default="fp32", help="fp32, fp16, bf16, int8 or int4 (default fp32)")
    export.add_argument(
        "--target",
        default="ort",
        help="ort (fused operators), tensorrt (standard operators, opset 23) or plain (optimum's graph, any decoder)",
    )
    export.add_argument("--revision", help="branch, tag or commit of a hub id")
    export.add_argument("--provider", default="any", help="any, or cuda: the graph must run on the CUDA provider")
    weights = export.add_argument_group("int8 and int4")
    weights.add_argument("--method", help="rtn, hqq, kquant or gptq (default: int8 rtn, int4 hqq)")
    weights.add_argument("--block-size", type=int, help="weights that share a scale (default: int8 16, int4 32)")
    weights.add_argument("--accuracy-level", type=int, help="0 computes in floats, 4 in int8 (default 4)")
    weights.add_argument(
        "--zero-points",
        help="integer, float, or none: symmetric, fastest (default: float for int4 by hqq and kquant, else integer)",
    )
    weights.add_argument(
        "--keep-float", help="parts kept in floats: none, or a list of qkv, o, gate, up, down, first:N, last:N"
    )
    weights.add_argument("--activations", help="type of activations and KV cache: fp32, fp16 or bf16 (default fp32)")
    weights.add_argument("--lm-head", help="float, int8 or int4 (default: int4 int8, else float)")
    weights.add_argument("--embedding", help="float or int8 (default float)")
    export.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin of a maker that you trust")
    export.add_argument("--force", action="store_true", help="replace another export of ours at OUT")

    random_model = add("random-model", _random_model, "write a checkpoint of a real LLaMA's shape with random weights")
    random_model.add_argument("out", type=Path, help="the folder to make")
    random_model.add_argument("--config", default="llama-2-7b", help="llama-2-7b, llama-2-13b or llama-2-70b")
    random_model.add_argument("--precision", default="fp16", help="fp32, fp16 or bf16 (default fp16)")
    random_model.add_argument("--layers", type=int, help="fewer layers than the real model")
    random_model.add_argument("--seed", type=int, default=0)

    inspect = add("inspect", _inspect, "what is in an exported folder; checks every file's hash")
    inspect.add_argument("folder", type=Path)

    generate = add("generate", _generate, "stream text from an exported folder")
    generate.add_argument("folder", type=Path)
    generate.add_argument("prompt", help="the text to continue, or '-' for standard input")
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    add_generate_options(generate)

    from bench.cli.validate import add_arguments

    add_arguments(add("validate", _validate, "is this exported folder still the model? Named checks and a verdict"))

    add("bench", _bench, "run the suite: the same as `pytest bench/`, whose options it takes (--profile smoke, ...)")

    from bench.cli import compare as compare_command
    from bench.cli import history as history_command
    from bench.latency import sweep

    compare = add(
        "compare", compare_command.run, "two sides in interleaved pairs, or two files of records: what moved?"
    )
    compare_command.add_arguments(compare)
    history = add("history", history_command.run, "past figures on this machine, and steps in them (advisory)")
    history_command.add_arguments(history)
    sweep.add_arguments(add("sweep", sweep.run, "a YAML file of models, precisions, providers, batch and prompt sizes"))

    report = add("report", _report, "render a record.json, or a comparison's report.json, again")
    report.add_argument("record", type=Path)
    report.add_argument("--out", type=Path, default=Path("reports/out"), help="folder of the page")

    from bench.cli import certify
    from bench.cli import perplexity as perplexity_command

    certify.add_commands(lambda name, text: add(name, _certificates, text))
    perplexity_command.add_command(lambda name, text: add(name, _perplexity, text))

    doctor = add("doctor", _doctor, "which providers really load here, and what to install for the rest")
    doctor.add_argument(
        "--no-bandwidth", action="store_true", help="leave the memory bandwidth unmeasured (1 GiB, 2 s)"
    )
    return parser


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


@contextmanager
def _bytes_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress in bytes on standard error; silent when that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _status(message: str) -> None:
    ERR.print(message, style="dim", highlight=False, markup=False)


def _demo_model(args: argparse.Namespace) -> int:
    from export.demo_model import demo_model

    with _bytes_bar("demo model") as progress:
        folder = demo_model(_status, progress)
    if args.json:
        _print_json({"folder": str(folder)})
    else:
        print(folder)
    return 0


def _export(args: argparse.Namespace) -> int:
    from export.spec import ExportSpec

    spec = ExportSpec(**{f.name: getattr(args, f.name) for f in fields(ExportSpec)})
    from export.pipeline import export_model

    calibration: Sequence[str] = ()
    if spec.method == "gptq":
        from bench.data.loading import load_shipped

        calibration = load_shipped().calibration()
    with _bytes_bar("weights") as progress:
        manifest, written = export_model(
            spec,
            args.out,
            force=args.force,
            calibration=calibration,
            allow_pickle=args.allow_pickle,
            status=_status,
            progress=progress,
        )
    if args.json:
        _print_json({"folder": str(args.out), "written": written, "manifest": asdict(manifest)})
    else:
        verb = "exported" if written else "already there:"
        fused = ", ".join(f"{n} {op}" for op, n in manifest.fused_ops.items())
        print(f"{verb} {manifest.model_name} {manifest.precision} at {args.out}: {manifest.node_count} nodes ({fused})")
    return 0


def _random_model(args: argparse.Namespace) -> int:
    from export.random_model import make_random_model

    with _bytes_bar("random weights") as progress:
        made = make_random_model(args.config, args.out, args.precision, args.layers, seed=args.seed, progress=progress)
    if args.json:
        _print_json({**asdict(made), "folder": str(made.folder)})
    else:
        print(
            f"{made.folder}: {args.config} with random weights, {made.parameters:,} parameters, "
            f"{made.weight_bytes / 1e9:.2f} GB in {made.shards} shards"
        )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from runtime.loading import read_folder

    folder = args.folder.expanduser()
    total = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) if folder.is_dir() else 0
    done = 0
    with _bytes_bar("hashing") as progress:

        def on_chunk(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        manifest = read_folder(folder, progress=on_chunk)
    if args.json:
        _print_json(asdict(manifest))
        return 0
    ours = bool(manifest.weights_sha256)
    title = f"{manifest.model_name}, " + ("every file as published" if ours else "a folder from elsewhere")
    table = Table(title=escape(title), show_header=False, title_justify="left")
    kv = manifest.kv
    identity = f"SHA-256 {manifest.weights_sha256[:16]}…" if ours else "unknown"
    q = manifest.quantisation
    rows = {
        "weights": manifest.weights_origin,
        "identity": f"{identity} over {manifest.parameters:,} parameters",
        "precision, target": f"{manifest.precision}, {manifest.target}, opset {manifest.opset}",
    }
    if q:
        rows["quantised"] = (
            f"{q.method}, blocks of {q.block_size}, accuracy level {q.accuracy_level}, zero points {q.zero_points}, "
            f"lm_head {q.lm_head}, embedding {q.embedding}, kept in floats: {q.keep_float}"
        )
    rows |= {
        "attention": f"{manifest.attention}, padding: {manifest.padding}, logits of {manifest.decode_logits} positions",
        "context": f"{manifest.context_length:,} tokens, vocabulary {manifest.vocab_size:,}",
        "graph": f"{manifest.node_count} nodes: " + ", ".join(f"{n} {op}" for op, n in manifest.fused_ops.items()),
        "KV cache": f"{kv.layers} layers x {kv.kv_heads} heads x {kv.head_dim}, {kv.dtype}, "
        f"{kv.bytes_per_token():,} bytes a token, "
        + ("past and present in one buffer" if kv.shared_buffer else "joined by Concat"),
        "files": ", ".join(f"{name} ({entry.size:,})" for name, entry in manifest.files.items()),
    }
    if ours:
        rows["made"] = f"{manifest.created_utc} by " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    if manifest.notes:
        rows["notes"] = "\n".join(manifest.notes)
    for key, value in rows.items():
        table.add_row(key, Text(value))
    Console().print(table)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from bench.cli.generate import run

    return run(args, ERR)


def _validate(args: argparse.Namespace) -> int:
    from bench.cli.validate import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    import pytest

    from bench.suite.run import SUITE

    # pytest's own codes: 0 passed, 1 failed, 2 interrupted, 3 internal error, 4 usage, 5 nothing collected; what the
    # suite ends with by itself (2 and 4 of this tool's contract) comes through unchanged.
    started = time.time()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        code = int(pytest.main([*SUITE, *args.options]))
    if code not in (0, 1):
        return 2 if code == 5 else code
    path = _report_dir(args.options) / "record.json"
    if not path.is_file() or path.stat().st_mtime < started:
        return code  # nothing was measured; an older record says nothing about this run
    from reports.record import read_record
    from reports.verdict import judge

    record = read_record(path)
    if args.json:
        sys.stdout.write(record.to_json())
    found = judge(record).exit_code
    return found if code == 0 else (found or 1)


def _report_dir(options: Sequence[str]) -> Path:
    """Where the suite writes, from its own option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--report-dir", type=Path, default=Path("reports/out"))
    found: Path = parser.parse_known_args(list(options))[0].report_dir
    return found


def _report(args: argparse.Namespace) -> int:
    from reports.publish import publish

    published = publish(args.record, args.out)
    if args.json:
        _print_json({"page": str(published.page), "exit_code": published.exit_code})
    else:
        published.show(Console())
        print(f"page: {published.page.resolve()}")
    return published.exit_code


@contextmanager
def _units_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress in units of work on standard error, with the time left; silent when that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _perplexity(args: argparse.Namespace) -> int:
    from bench.cli import perplexity as perplexity_command

    found = perplexity_command.run(args, _status, _units_bar)
    if args.json:
        _print_json(found)
    else:
        print("\n".join(perplexity_command.lines(found)))
    return 0


def _certificates(args: argparse.Namespace) -> int:
    from bench.cli import certify

    run = {"keygen": certify.run_keygen, "certify": certify.run_certify, "verify": certify.run_verify}[args.command]
    return run(args, _bytes_bar)


def _doctor(args: argparse.Namespace) -> int:
    from bench.cli.doctor import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal without UTF-8
    if argv is None:

        def end(*_: object) -> None:
            raise SystemExit(143)  # what is half-written is removed on the way, as behind Ctrl-C

        signal.signal(signal.SIGTERM, end)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.options = rest
    args.typed = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        ERR.print("interrupted; nothing half-written was left", style="yellow")
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        ERR.print(f"error: {told[0]}", style="red", highlight=False, markup=False, soft_wrap=True)
        return told[1]


if __name__ == "__main__":
    sys.exit(main())
