"""Results kept by content: a second folder against the same baseline costs half, and a run that was killed goes on.

One file a result, renamed into place when complete, with its SHA-256: a killed run loses the window it was in, and a
damaged file is found, said and computed again. The disk is bounded (``LLAMA_ONNX_CACHE_GB``, 8 by default): the key
used longest ago goes first, never the evaluation that is running.

Of the baseline whole fp32 logits of each scored window are kept, as the session gave them: a KL divergence needs the
whole distribution, top-k is not exact. That is ``tokens x vocabulary x 4`` bytes, 2 GB for the project's own texts on
the demo model. Its key holds everything that may decide the bits: checkpoint files, device, versions of torch and
transformers, CPU model and threads (one and two gave equal bits on a window of the demo model; PyTorch does not
promise it). Precision, attention kernel and token ids are in the request. On that window (384 tokens, 75 MB) keeping
took 0.42 s and reading with its SHA-256 0.06 s, computing 3 to 12 s on two busy cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.digests import folder_digest, hash_baseline
from bench.errors import BenchError
from export.cache import cache_dir
from runtime.session import Logits
from runtime.settings import cpu_name, usable_cores

BOUND_ENV = "LLAMA_ONNX_CACHE_GB"
DEFAULT_GB = 8.0
_MAGIC = b"LOBLOG01"
_HEADER = 64
Say = Callable[[str], None]


def bound_bytes() -> int:
    """The most bytes that all baselines together may take on the disk.

    Raises:
        BenchError: the environment variable is not a number.
    """
    text = os.environ.get(BOUND_ENV, "")
    try:
        found = float(text) if text else DEFAULT_GB
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e6:
        raise BenchError(f"{BOUND_ENV}={text!r} is not a size in GB; write for example {BOUND_ENV}=8 (0 keeps nothing)")
    return int(found * 1e9)


def baseline_key(
    checkpoint: Path,
    device: str = "cpu",
    threads: int | None = None,
    hashes: dict[str, dict[str, str]] | None = None,
) -> str:
    """Hex name of a checkpoint's results on PyTorch; loads neither torch nor transformers.

    Every file of the checkpoint is read once, unless ``hashes`` holds what :func:`hash_baseline` found.
    """
    from bench.machine.environment import machine, versions

    installed = versions()
    return key_of(
        {
            "weights_sha256": folder_digest((hashes or hash_baseline(checkpoint))["baseline"]),
            "device": device,
            "threads": threads or usable_cores(),
            "cpu": cpu_name() if device == "cpu" else f"{cpu_name()}, {machine().gpu}",
            "torch": installed.get("torch", "none"),
            "transformers": installed.get("transformers", "none"),
        }
    )


def key_of(facts: Any) -> str:
    """Hex name of what these JSON values decide."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class ResultStore:
    """Results of one key below ``root``; see the module for what is kept and how long.

    Args:
        key: digest of what decides the results (:func:`baseline_key`, :func:`key_of`).
        root: folder of all keys; None takes the baselines' in the user's cache.
        bound: most bytes of all keys together; None takes :func:`bound_bytes`.
        say: told in one line about damaged entries and a bound that is too small.
        title: what those lines call it.
    """

    def __init__(
        self,
        key: str,
        root: Path | None = None,
        bound: int | None = None,
        say: Say = lambda _: None,
        title: str = "baseline cache",
    ) -> None:
        self.key, self._title = key, title
        self._root = root or cache_dir() / "baseline"
        self.folder = self._root / key
        self._bound = bound_bytes() if bound is None else bound
        self._say = say
        self._full = False
        self._others: list[Path] = []
        self._beside = 0
        self._off = False
        try:
            self._open()
        except OSError as e:
            # The evaluation goes on: nothing of it depends on what is kept.
            self._off = True
            say(f"{title}: {self._root} cannot be used ({e.strerror}); nothing is kept")

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # readable is enough
            os.utime(self.folder)  # used last: evicted last
        for left in self.folder.glob(".partial-*"):
            pid = left.name.split("-")[1]
            if not Path(f"/proc/{pid}").exists():
                left.unlink(missing_ok=True)
        self._others = sorted(
            (p for p in self._root.iterdir() if p.is_dir() and p != self.folder), key=lambda p: p.stat().st_mtime
        )
        self._beside = sum(_bytes_of(p) for p in self._others)

    def array(self, request: Any) -> Logits | None:
        """A kept fp32 matrix, or None."""
        path = self.folder / f"{_name(request)}.logits"
        try:
            with path.open("rb") as f:
                header = f.read(_HEADER)
                flat = np.fromfile(f, np.float32)
        except OSError:
            return None
        rows, columns = np.frombuffer(header[40:56], np.uint64) if len(header) == _HEADER else (0, 0)
        whole = header[:8] == _MAGIC and flat.size == int(rows) * int(columns) > 0
        if not whole or hashlib.sha256(flat.data).digest() != header[8:40]:
            self._damaged(path)
            return None
        return flat.reshape(int(rows), int(columns))

    def keep_array(self, request: Any, matrix: Logits) -> None:
        """Keep a copy of an fp32 matrix, unless the bound forbids it."""
        flat = np.ascontiguousarray(matrix, np.float32)
        header = _MAGIC + hashlib.sha256(flat.data).digest() + np.array(flat.shape, np.uint64).tobytes()
        self._write(f"{_name(request)}.logits", [header.ljust(_HEADER, b"\0"), flat.data])

    def value(self, request: Any) -> Any | None:
        """A kept JSON value (generations, scores of a chunk), or None."""
        path = self.folder / f"{_name(request)}.json"
        if self._off:
            return None
        try:
            raw = json.loads(path.read_bytes())
            if raw["sha256"] == _name(raw["value"]):
                return raw["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._damaged(path)
        return None

    def keep_value(self, request: Any, value: Any) -> None:
        """Keep a JSON value."""
        self._write(f"{_name(request)}.json", [json.dumps({"sha256": _name(value), "value": value}).encode()])

    def forget(self, requests: Iterable[Any]) -> None:
        """Remove kept JSON values, and the folder with the last of them."""
        for request in () if self._off else requests:
            (self.folder / f"{_name(request)}.json").unlink(missing_ok=True)
        with suppress(OSError):  # others are still in it
            self.folder.rmdir()

    def _damaged(self, path: Path) -> None:
        self._say(f"{self._title}: {path.name[:12]}… is damaged and is computed again")
        path.unlink(missing_ok=True)

    def _write(self, name: str, parts: Sequence[Any]) -> None:
        if self._off:
            return
        need = sum(memoryview(p).nbytes for p in parts)
        need += _bytes_of(self.folder)  # counted anew: workers write here too
        while self._others and self._beside + need > self._bound:
            oldest = self._others.pop(0)
            self._beside -= _bytes_of(oldest)
            shutil.rmtree(oldest, ignore_errors=True)
        if self._beside + need > self._bound:
            if not self._full:
                self._say(
                    f"{self._title}: {self._bound / 1e9:g} GB do not hold this evaluation, the rest is not kept; "
                    f"raise {BOUND_ENV}"
                )
            self._full = True
            return
        work = self.folder / f".partial-{os.getpid()}-{name}"
        try:
            with work.open("wb") as f:
                for part in parts:
                    f.write(part)
            work.replace(self.folder / name)
        except OSError as e:
            work.unlink(missing_ok=True)
            self._say(f"{self._title}: cannot write ({e.strerror}); this result is not kept")


def _bytes_of(folder: Path) -> int:
    size = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process renames what it has written
            size += path.stat().st_size
    return size


def _name(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
