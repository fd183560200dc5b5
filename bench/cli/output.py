"""Where a command writes: results on standard output (with ``--json`` one document), the rest on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


class Output(Console):
    """A terminal; where its reader is gone, that is told from a verdict."""

    def on_broken_pipe(self) -> None:
        """What rich calls."""
        raise BrokenPipeError


ERR = Output(stderr=True)


def status(message: str) -> None:
    """A line on standard error about what is being done."""
    ERR.print(message, style="dim", highlight=False, markup=False, soft_wrap=True)


def add_out(parser: argparse.ArgumentParser, what: str, default: str) -> None:
    """The option ``--out DIR``."""
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=f"{what} (default {default})")


def write_json(document: Any) -> None:
    """The one JSON document; records know their own form (``to_json``)."""
    own = getattr(document, "to_json", None)
    sys.stdout.write(own() if own else json.dumps(document, indent=1) + "\n")


def show(
    args: argparse.Namespace, document: Any, text: str | Table | Callable[[Console], None], last: str = ""
) -> None:
    """The result: ``document`` with ``--json``, else ``text`` or what it prints on a console, and a last line."""
    if args.json:
        return write_json(document)
    if isinstance(text, str):
        print(text)
    elif isinstance(text, Table):
        Output().print(text)
    else:
        text(Output())
    if last:
        print(last)
