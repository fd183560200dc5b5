"""One measurement at a time on a machine: two at once would each measure the other.

The lock file lies in the system's temporary folder, so that all users of the machine meet there; ``LLAMA_ONNX_LOCK``
moves it. The kernel frees it when its process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.errors import BenchError

LOCK_ENV = "LLAMA_ONNX_LOCK"


class BusyError(BenchError):
    """Another measurement runs on this machine."""

    exit_code = 4


def lock_path() -> Path:
    """Where the lock lies."""
    return Path(os.environ.get(LOCK_ENV) or Path(tempfile.gettempdir()) / "llama-onnx-bench.lock")


def _holder(path: Path) -> str:
    try:
        return path.with_suffix(".holder").read_text(encoding="utf-8").strip() or "an unknown process"
    except OSError:
        return "an unknown process"


@contextmanager
def machine_lock(what: str, wait_s: float = 0.0, status: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the machine for a measurement.

    Args:
        what: who holds it, for the message that the next one gets.
        wait_s: how long to wait for another measurement to end; 0 refuses at once.
        status: told once when it has to wait.

    Raises:
        BusyError: still held after ``wait_s``.
    """
    from filelock import FileLock, Timeout

    path = lock_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, mode=0o666)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait_s <= 0:
                raise
            status(f"waiting: {_holder(path)} measures on this machine")
            lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(
            f"{_holder(path)} measures on this machine; two at once would measure each other. "
            "Wait for its end, or pass --wait SECONDS"
        ) from None
    with suppress(OSError):
        path.with_suffix(".holder").write_text(f"{what} (process {os.getpid()})", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()
