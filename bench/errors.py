"""What can go wrong around a benchmark, and which errors of the whole program are the user's to mend.

Each error names the thing and the remedy. :func:`user_error` alone decides what is told in a line and what is a defect
of ours, whose traceback is needed.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from export.manifest import UserError
from reports.errors import ReportError


class BenchError(UserError):
    """Base of the benchmark's errors."""


class DatasetError(BenchError):
    """A dataset that is missing, empty or malformed (the line is named)."""


class MachineError(BenchError):
    """This machine cannot do it: no disk, memory or open files left."""

    exit_code = 4


class BaselineError(BenchError):
    """The baseline cannot be read or computed, which says nothing about the folder under test."""


def user_error(error: BaseException) -> tuple[str, int] | None:
    """What to tell the user and the exit code; None for a defect of ours."""
    if isinstance(error, UserError | ReportError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'no size given'}); take a machine with more, or a smaller model or batch", 4
    said = _outside(error)
    return None if said is None else (said, 2)


def _outside(error: BaseException) -> str | None:
    """A line for what the machine or the input is at fault for, in the words of another library."""
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'input or output'}: {error.strerror or error}; name another place, or make room there"
        )
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be what it should be; write it again"
    if isinstance(error, UnicodeError):
        return f"text that is not UTF-8 ({getattr(error, 'reason', error)}); write it in that encoding"
    if isinstance(error, sqlite3.Error):
        return f"the history database cannot be used ({error}); set LLAMA_ONNX_HISTORY to another file"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~ and a name that has no home directory here; write the whole path"
    return None


def check_writable(folder: Path) -> None:
    """Whether results can be written to a folder that may not be there yet, asked before they are made.

    Raises:
        BenchError: they cannot.
    """
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BenchError(
            f"{folder} cannot be written ({there} is {'read-only' if there.is_dir() else 'a file'}); "
            "name another folder"
        )


def last_line(errors: str) -> str:
    """Why a command failed: the last line of its standard error."""
    return (errors.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")[:500]


def run_child(work: Callable[[], None]) -> int:
    """The body of a child process of ours: an error of the user's is the last line on standard error and the exit code,
    for the parent to quote."""
    try:
        work()
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        print(f"error: {told[0]}", file=sys.stderr)
        return told[1]
    return 0
