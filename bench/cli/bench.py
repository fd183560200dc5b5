"""``llama-onnx bench``: ``pytest bench/`` with the verdict's exit code. Try: ``llama-onnx bench --profile smoke``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cli.output import write_json

HELP = (
    "measure latency and parity: the same as `pytest bench/`, whose options it takes (--model, --exported, --profile "
    "smoke, ...; all of them: pytest bench/ --help, under llama-onnx-bench)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: what it does not know is passed on."""


def run(args: argparse.Namespace) -> int:
    """Run the suite; the exit code is the verdict's, or pytest's."""
    import pytest

    from bench.suite.run import SUITE

    # pytest's own codes: 0 passed, 1 failed, 2 interrupted, 3 internal error, 4 usage, 5 nothing collected; what the
    # suite ends with by itself (this tool's own codes) comes through unchanged.
    started = time.time()
    began = _Began()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        code = int(pytest.main([*SUITE, *args.options], plugins=[began]))
    if code == 5 or (code == 4 and not began.session):
        return 2
    path = _report_dir(args.options) / "record.json"
    if args.json and path.is_file() and path.stat().st_mtime >= started:  # an older record says nothing about this run
        from reports.record import RunRecord

        write_json(RunRecord.read(path))
    return code


class _Began:
    """A pytest plugin that knows whether the options were accepted: pytest's code for wrong ones is this tool's 4."""

    session = False

    def pytest_sessionstart(self) -> None:
        self.session = True


def _report_dir(options: Sequence[str]) -> Path:
    """Where the suite writes, from its own option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--report-dir", type=Path, default=Path("reports/out"))
    found: Path = parser.parse_known_args(list(options))[0].report_dir
    return found
