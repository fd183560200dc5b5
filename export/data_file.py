"""The external-data file in the making: written and hashed by threads of their own, past the page cache when large.

Through the page cache a large file costs more processor time than anything else in an export, and drives out what the
machine had cached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

DIRECT_FROM = 4 << 30
"""Bytes from which a file bypasses the page cache; a smaller one is likely to be read again at once."""
CHUNK = 1 << 24
_CHUNKS = 4
_SECTOR = 4096


class DataFile:
    """A file of known size, written from front to back. Use as a context manager, and :meth:`finish` at the end.

    Args:
        path: written anew.
        size: bytes in all.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self.end = 0
        """Bytes so far."""
        self._hash = hashlib.sha256()
        self._fd = _opened(path, direct=size >= DIRECT_FROM)
        # Anonymous mappings begin at page boundaries, as direct writes demand.
        self._free = [mmap.mmap(-1, CHUNK) for _ in range(_CHUNKS)]
        self._busy: deque[tuple[mmap.mmap, list[Future[Any]]]] = deque()
        self._chunk = self._free.pop()
        self._filled = 0
        self._writer, self._hasher = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        os.close(self._fd)

    def write(self, data: memoryview) -> None:
        """Append bytes; they are copied, and an error of an earlier write may be raised here."""
        while data:
            n = min(len(data), CHUNK - self._filled)
            self._chunk[self._filled : self._filled + n] = data[:n]
            self._filled += n
            self.end += n
            data = data[n:]
            if self._filled == CHUNK:
                self._send()

    def pad_to(self, offset: int) -> None:
        """Append zeros up to ``offset``."""
        self.write(memoryview(bytes(offset - self.end)))

    def finish(self) -> str:
        """Wait until everything lies on the disk; SHA-256 (hex) of the file.

        Raises:
            ValueError: another number of bytes was written than announced.
        """
        if self.end != self._size:
            raise ValueError(f"{self.end} bytes were written to a file of {self._size}")
        if self._filled:
            self._send()
        while self._busy:
            self._reclaim()
        os.ftruncate(self._fd, self._size)  # a direct write ends at a whole sector
        os.fsync(self._fd)
        return self._hash.hexdigest()

    def _send(self) -> None:
        full = memoryview(self._chunk)[: self._filled]
        jobs = [
            self._writer.submit(_write, self._fd, self._chunk, self._filled),
            self._hasher.submit(self._hash.update, full),
        ]
        self._busy.append((self._chunk, jobs))
        if not self._free:
            self._reclaim()
        self._chunk = self._free.pop()
        self._filled = 0

    def _reclaim(self) -> None:
        chunk, jobs = self._busy.popleft()
        for job in jobs:
            job.result()
        self._free.append(chunk)


def _opened(path: Path, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if direct and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # not every file system can
            return os.open(path, flags | os.O_DIRECT, 0o644)
    return os.open(path, flags, 0o644)


def _write(fd: int, chunk: mmap.mmap, length: int) -> None:
    """Write the first ``length`` bytes; in whole sectors where the file is written directly."""
    direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
    if direct:
        length = -(-length // _SECTOR) * _SECTOR  # what is too much is cut off at the end
    view = memoryview(chunk)[:length]
    while view:
        try:
            n = os.write(fd, view)
        except OSError as e:
            if e.errno != errno.EINVAL or not direct:
                raise
            # The file system took the flag and refuses the write, or a short one left half a sector.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            direct = False
            continue
        view = view[n:]
