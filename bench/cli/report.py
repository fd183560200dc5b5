"""``llama-onnx report``: the page of a document that was written before. Try: ``llama-onnx report comparison.json``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli.output import add_out, show

HELP = "render the page of a record.json, comparison.json, validation.json or matrix.json again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The document, and where its page goes."""
    parser.add_argument(
        "file",
        type=Path,
        help="record.json of `bench`, comparison.json of `compare`, validation.json of `validate`, or matrix.json of "
        "`matrix`",
    )
    add_out(parser, "folder of the page", "reports/out")


def run(args: argparse.Namespace) -> int:
    """Render; the exit code is the verdict's."""
    from reports.publish import publish

    published = publish(args.file, args.out)
    document = {"page": str(published.page), "exit_code": published.exit_code}
    show(args, document, published.show, f"page: {published.page.resolve()}")
    return published.exit_code
