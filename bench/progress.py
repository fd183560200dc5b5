"""The progress bar of every command and of ``pytest bench/``: on standard error, silent where that is no terminal.

Try: ``python -c "import time; from bench.progress import progress
with progress('pairs', 20) as bar:
    for k in range(20): time.sleep(0.1); bar.tick(f'pair {k}')"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class Bar:
    """A bar that counts units of work or bytes; made by :func:`progress`."""

    def __init__(self, shown: Progress, title: str, total: int | None) -> None:
        self._shown, self._title, self._total = shown, title, total
        self._task = shown.add_task("", total=total, title=title)

    def tick(self, message: str = "", by: int = 1) -> None:
        """So much is done, and what it was."""
        self._shown.update(self._task, advance=by, description=message)

    def say(self, message: str) -> None:
        """What is being done."""
        self._shown.update(self._task, description=message)

    def at(self, done: int, total: int) -> None:
        """``done`` of ``total``; another total begins a stage with its own time left, 0 is one of unknown length."""
        if total != self._total:  # rich cannot take a total back
            said = self._shown.tasks[0].description
            self._shown.remove_task(self._task)
            self._total = total
            self._task = self._shown.add_task(said, total=total or None, title=self._title)
        self._shown.update(self._task, completed=done)


@contextmanager
def progress(
    title: str, total: int | None = None, unit: Literal["units", "bytes"] = "units", console: Console | None = None
) -> Iterator[Bar]:
    """Title, bar, how much of how much, time gone and time left, and what is being done."""
    count: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    console = console or Console(stderr=True)
    with Progress(
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=12),
        count,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    ) as shown:
        yield Bar(shown, title, total)


@contextmanager
def hashing(*folders: Path) -> Iterator[Callable[[int], None]]:
    """Progress over the bytes of all files of the folders; called with the bytes of each chunk."""
    total = sum(p.stat().st_size for f in folders if f.is_dir() for p in f.rglob("*") if p.is_file())
    with progress("hashing", total, "bytes") as bar:
        yield lambda n: bar.tick(by=n)
