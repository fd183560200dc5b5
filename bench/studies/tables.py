"""What a study found, as a table for the docs and for a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In GitHub's Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]]) + "\n"


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """On the terminal."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_json(path: Path, document: Any) -> None:
    """The raw numbers."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
