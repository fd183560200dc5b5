"""``llama-onnx bench``: ``pytest bench/`` with the verdict's exit code. Try: ``llama-onnx bench --profile smoke``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
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

    class Began:
        """Knows where the report goes once the options were accepted: pytest's code for wrong ones is this tool's 4."""

        report_dir: Path | None = None

        @pytest.hookimpl(tryfirst=True)  # the suite's own may end the session
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            self.report_dir = session.config.option.report_dir

    # pytest's own codes: 0 passed, 1 failed, 2 interrupted, 3 internal error, 4 usage, 5 nothing collected; what the
    # suite ends with by itself (this tool's own codes) comes through unchanged.
    started = time.time()
    began = Began()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        code = int(pytest.main([*SUITE, *args.options], plugins=[began]))
    if code == 5 or began.report_dir is None:
        return 2 if code in (4, 5) else code
    path = began.report_dir / "record.json"
    if args.json and path.is_file() and path.stat().st_mtime >= started:  # an older record says nothing about this run
        from reports.record import RunRecord

        write_json(RunRecord.read(path))
    return code
