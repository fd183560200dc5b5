"""Memory that was freed goes back to the system, so that what a process holds is what it uses.

glibc keeps freed memory for the next caller. Where gigabytes of one model make room for another's that is no saving
but twice the memory. Elsewhere this does nothing. Try: ``python -m pytest tests/runtime/test_one_graph.py``.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def trim() -> None:
    """Return free heap pages to the system (``malloc_trim``)."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def give_back() -> None:
    """Collect what Python holds in cycles, then :func:`trim`."""
    gc.collect()
    trim()
