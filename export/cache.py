"""Where things are kept between runs: the user's cache folder, and atomic publication into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
import psutil

from export.errors import DestinationError

CACHE_ENV = "LLAMA_ONNX_CACHE"


def cache_dir() -> Path:
    """The user's cache folder for this tool; the environment variable ``LLAMA_ONNX_CACHE`` moves it."""
    chosen = os.environ.get(CACHE_ENV)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("llama-onnx-bench"))


def require_space(out: Path, nbytes: int, what: str) -> None:
    """Refuse to publish ``nbytes`` as folder ``out`` where the disk beside it has not that and 64 MiB more.

    Raises:
        DestinationError: says how much ``what`` needs.
    """
    needed = nbytes + (64 << 20)
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DestinationError(
            f"{what} needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; "
            f"make room or choose another OUT"
        )


@contextmanager
def publish(target: Path, shared: bool = False, replace: bool = False) -> Iterator[Path]:
    """A new folder that becomes ``target`` in one rename when the block ends well, and vanishes otherwise.

    ``shared`` is for a cache: when another process published the same target meanwhile, its folder stays. ``replace``
    lets the new folder take the place of one that is there, which stays until the new one is complete.

    A process that was killed leaves its unfinished folder *beside* the target, never under its name; the next
    caller removes what dead processes left.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix, aside = f".{target.name}.partial-", f".{target.name}.replaced-"
    for old in [p for p in target.parent.iterdir() if p.name.startswith((prefix, aside))]:
        pid = old.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if old.name.startswith(aside) and not target.exists():
                old.rename(target)  # killed between the two renames
            else:
                shutil.rmtree(old, ignore_errors=True)
    work = target.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        for path in filter(Path.is_file, work.rglob("*")):
            with path.open("rb") as f, suppress(OSError):
                os.fsync(f.fileno())
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if shared and target.is_dir():
            shutil.rmtree(work)
        elif replace and target.is_dir():
            old = target.with_name(f"{aside}{os.getpid()}")
            target.rename(old)
            try:
                work.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
