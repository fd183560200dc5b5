"""Memory that is resident moves into huge pages, memory that is not stays where it is."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest

from runtime.huge_pages import HUGE, collapse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MADV_COLLAPSE is Linux's")


def _smaps(address: int) -> dict[str, int]:
    """kB figures of the mapping that holds an address."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and (figure := re.match(r"(\w+): +(\d+) kB", line)):
            found[figure[1]] = int(figure[2])
    return found


def test_resident_memory_is_moved_and_nothing_else_becomes_resident() -> None:
    with mmap.mmap(-1, 16 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[: 8 * HUGE] = b"x" * (8 * HUGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area)) + HUGE
        before = _smaps(address)
        if collapse() == 0:
            pytest.skip("this kernel has no MADV_COLLAPSE")
        after = _smaps(address)
        assert before["AnonHugePages"] == 0
        assert after["AnonHugePages"] * 1024 >= 6 * HUGE
        # A neighbouring mapping of some threads may have been joined to this one; the 8 empty huge pages are not in it.
        assert after["Rss"] * 1024 < before["Rss"] * 1024 + HUGE
        assert area[: 8 * HUGE] == b"x" * (8 * HUGE)
