"""Settings of the whole process that a piece of work needs otherwise: glibc's malloc, PyTorch's threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# malloc.h's numbers of two parameters, and what they are set to after blocks_apart().
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USUAL, _KEPT = 32 << 20, 64 << 20


def malloc_limits(apart: int, kept: int | None = None) -> None:
    """Tell malloc from which size on a block gets memory of its own, and how much freed memory to keep (bytes).

    Another C library has its own ways: there this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, apart)
        if kept is not None:
            mallopt(_M_TRIM_THRESHOLD, kept)


@contextmanager
def blocks_apart(nbytes: int) -> Iterator[None]:
    """Inside, blocks of at least so many bytes get memory of their own, which goes back as soon as they are freed.

    For large blocks that each make room for a slightly larger one: in the heap none fits where the last one was. It
    costs a page fault for every 4 KiB, so it is for moments.
    """
    malloc_limits(nbytes)
    try:
        yield
    finally:
        malloc_limits(_USUAL, _KEPT)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's threads inside the block; after it they are what they were."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
