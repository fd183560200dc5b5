"""What a long evaluation has done so far, one line each, so that a killed one goes on where it stopped.

A line is appended in one write with its own digest. A process that dies while writing leaves half a line, which the
next one cuts off: at most the unit that was being written is done again. Floats survive exactly (JSON carries their
shortest exact form). One writer at a time: the file is locked.
Try: kill ``llama-onnx perplexity ...`` half-way and start it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.errors import BenchError


class JournalError(BenchError):
    """A journal that another process is writing."""


def _line(name: str, value: Any) -> bytes:
    body = json.dumps([name, value], separators=(",", ":"))
    return f"{hashlib.sha256(body.encode()).hexdigest()[:16]} {body}\n".encode()


class Journal:
    """Results by name, kept in an append-only file that is locked while it is open.

    Args:
        path: the file; made when missing. Its name should hold a digest of everything that decides the results.
        say: told in a line what was found damaged.

    Raises:
        JournalError: another process has it open.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise JournalError(f"{path} is being written by another process; wait for it or stop it") from None
        self._done: dict[str, Any] = {}
        self._file.seek(0)
        content = self._file.read()
        good = 0
        for line in content.splitlines(keepends=True):
            if not self._read(line):
                break
            good += len(line)
        if good < len(content):
            say(f"{path.name}: the last {len(content) - good} bytes are damaged or half-written; done again")
            os.ftruncate(self._file.fileno(), good)

    def _read(self, line: bytes) -> bool:
        digest, _, body = line.partition(b" ")
        if not line.endswith(b"\n") or hashlib.sha256(body[:-1]).hexdigest()[:16].encode() != digest:
            return False
        name, value = json.loads(body)
        self._done[name] = value
        return True

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def get(self, name: str) -> Any:
        """The value under a name; KeyError when it was not done."""
        return self._done[name]

    def put(self, name: str, value: Any) -> None:
        """Append a JSON value; it is in the file when this returns."""
        line = _line(name, value)
        while line:  # a raw write may be short
            line = line[self._file.write(line) :]
        self._done[name] = json.loads(json.dumps(value))

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value under a name, computed and appended where it is not done yet."""
        if name not in self:
            self.put(name, compute())
        return self.get(name)

    def close(self) -> None:
        """Release the lock; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
