"""Settings of the whole process: malloc's limits, PyTorch's threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

APART = """
import contextlib, ctypes, sys
import numpy as np, psutil
from export.process import blocks_apart

def gone() -> int:
    "Bytes that go back when every other of 20 blocks of 3 MB is freed."
    blocks = [np.ones(3 << 20, np.uint8) for _ in range(20)]
    before = psutil.Process().memory_info().rss
    del blocks[::2]
    return before - psutil.Process().memory_info().rss

libc = ctypes.CDLL(None)
libc.mallopt(-3, 32 << 20), libc.mallopt(-1, 64 << 20)  # malloc gets there by itself when it meets large blocks
with blocks_apart(1 << 20) if sys.argv[1] == "apart" else contextlib.nullcontext():
    inside = gone()
print(inside, gone())
"""


def test_large_blocks_apart_go_back_at_once() -> None:
    """In the heap a freed block stays with the process while its neighbours live; after the block it is so again."""
    if sys.platform != "linux":
        pytest.skip("glibc's malloc")
    found = {}
    for how in ("apart", "heap"):
        done = subprocess.run([sys.executable, "-c", APART, how], check=True, capture_output=True, text=True)
        found[how] = [int(n) for n in done.stdout.split()]
    assert found["apart"][0] > 25e6
    assert max(found["apart"][1], *found["heap"]) < 10e6
