"""The external-data file in the making: every byte in order, hashed, directly or through the page cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export.data_file
from export.data_file import DataFile

SIZES = (0, 1, 4095, 4096, 4097, 3 * 8192, 8192 * 9 + 5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.data_file, "CHUNK", 8192)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def written(path: Path, size: int, data: bytes, step: int = 1 << 30) -> str:
    with DataFile(path, size) as file:
        for i in range(0, len(data), step):
            file.write(memoryview(data[i : i + step]))
        return file.finish()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1000, 8192, 100_000])
def test_every_byte_arrives(
    size: int, step: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.data_file, "DIRECT_FROM", 0 if direct else 1 << 40)
    wanted = content(size)
    digest = written(tmp_path / "data", size, wanted, step)
    assert (tmp_path / "data").read_bytes() == wanted
    assert digest == hashlib.sha256(wanted).hexdigest()


def test_padding_is_zeros(tmp_path: Path) -> None:
    with DataFile(tmp_path / "data", 20_003) as file:
        file.write(memoryview(b"abc"))
        file.pad_to(20_000)
        file.write(memoryview(b"xyz"))
        file.finish()
    assert (tmp_path / "data").read_bytes() == b"abc" + bytes(19_997) + b"xyz"


def test_what_was_there_is_gone(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(content(50_000))
    written(tmp_path / "data", 2, b"ab")
    assert (tmp_path / "data").read_bytes() == b"ab"


def test_a_large_file_passes_the_page_cache_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    own = export.data_file._write

    def write(fd: int, *arguments: Any) -> None:
        seen.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        own(fd, *arguments)

    monkeypatch.setattr(export.data_file, "_write", write)
    monkeypatch.setattr(export.data_file, "DIRECT_FROM", 10_000)
    for size in (9_999, 10_000):
        written(tmp_path / "data", size, content(size))
    if not any(seen):
        pytest.skip("this file system has no direct writes")
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("at", ["open", "write"])
def test_a_file_system_without_direct_writes_is_written_to_all_the_same(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.data_file, "DIRECT_FROM", 0)
    refused: list[str] = []
    own = {"open": os.open, "write": os.write}

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        if at == "open" and flags & os.O_DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "no direct writes here")
        return own["open"](path, flags, mode)

    def write(fd: int, data: Any) -> int:
        if at == "write" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append("write")
            raise OSError(errno.EINVAL, "no direct writes here")
        return own["write"](fd, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    wanted = content(30_001)
    digest = written(tmp_path / "data", len(wanted), wanted)
    if not refused:
        pytest.skip("this file system has no direct writes")
    assert len(refused) == 1
    assert (tmp_path / "data").read_bytes() == wanted
    assert digest == hashlib.sha256(wanted).hexdigest()


def test_a_write_that_is_refused_either_way_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.data_file, "DIRECT_FROM", 0)
    tries: list[int] = []

    def write(fd: int, data: Any) -> int:
        tries.append(fd)
        raise OSError(errno.EINVAL if len(tries) < 9 else errno.EIO, "Invalid argument")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="Invalid argument"):
        written(tmp_path / "data", 5, b"abcde")
    assert len(tries) <= 2


@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_lose_nothing(direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.data_file, "DIRECT_FROM", 0 if direct else 1 << 40)
    own = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: own(fd, data[: max(1, len(data) // 2)]))
    wanted = content(40_003)
    written(tmp_path / "data", len(wanted), wanted)
    assert (tmp_path / "data").read_bytes() == wanted


def test_a_full_disk_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left") as caught:
        written(tmp_path / "data", 1 << 20, bytes(1 << 20))
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_is_too_short_or_too_long_is_no_success(tmp_path: Path) -> None:
    for size in (99, 101):
        with pytest.raises(ValueError, match=f"100 bytes .* {size}"):
            written(tmp_path / "data", size, bytes(100))
