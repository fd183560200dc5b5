"""The command line, ``llama-onnx COMMAND``; ``llama-onnx --help`` lists the commands.

``--json`` puts one JSON document on standard output and everything else on standard error. Exit codes: 0 passed,
1 a gate failed, 2 wrong input, 3 inconclusive, 4 this machine cannot run what was asked.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from bench.cli import (
    bench,
    certify,
    compare,
    demo_model,
    doctor,
    engine,
    export,
    generate,
    history,
    inspect,
    keygen,
    matrix,
    perplexity,
    random_model,
    report,
    sweep,
    validate,
    verify,
)
from bench.cli.output import ERR
from bench.errors import user_error

COMMANDS = (
    demo_model,
    export,
    engine,
    random_model,
    inspect,
    generate,
    validate,
    bench,
    compare,
    matrix,
    history,
    sweep,
    report,
    keygen,
    certify,
    verify,
    perplexity,
    doctor,
)
"""In the order of ``--help``; see :mod:`bench.cli` for what a command is."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-onnx", description="The gate before an ONNX export of a LLaMA ships: latency and parity."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal without UTF-8
    if argv is None:

        def end(*_: object) -> None:
            raise SystemExit(143)  # what is half-written is removed on the way, as after Ctrl-C

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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say at the end of the process
        return 141  # as a shell names the end by SIGPIPE: the reader's end is no verdict
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        ERR.print(f"error: {told[0]}", style="red", highlight=False, markup=False, soft_wrap=True)
        return told[1]


if __name__ == "__main__":
    sys.exit(main())
