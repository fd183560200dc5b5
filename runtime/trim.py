"""Memory that was freed goes back to the system, so that what a process holds is what it uses.

glibc keeps freed memory for the next caller. Where gigabytes of one model make room for another's that is no saving
but twice the memory. Elsewhere this does nothing. Try: ``python -m pytest tests/runtime/test_one_graph.py``.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# malloc.h's numbers of two parameters, and what they are set to behind apart().
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USUAL = 32 << 20
_KEPT = 64 << 20


def trim() -> None:
    """Return free heap pages to the system (``malloc_trim``)."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def give_back() -> None:
    """Collect what Python holds in cycles, then :func:`trim`."""
    gc.collect()
    trim()


@contextmanager
def apart(nbytes: int) -> Iterator[None]:
    """Inside, blocks of at least so many bytes get memory of their own, which goes back as soon as they are freed.

    For large blocks that each make room for a slightly larger one: in the heap none fits where the last one was. It
    costs a page fault for every 4 KiB, so it is for moments.
    """
    mallopt = None
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, nbytes)
    try:
        yield
    finally:
        if mallopt:
            mallopt(_M_MMAP_THRESHOLD, _USUAL)
            mallopt(_M_TRIM_THRESHOLD, _KEPT)
