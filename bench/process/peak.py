"""Peak resident memory of the process that asks.

Standard library only, and loaded by its path (``runpy``) where this suite cannot be imported: in other virtual
environments, and beside the packages of another revision of the suite.
"""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Peak resident bytes. Linux keeps ``ru_maxrss`` across exec, so it may be the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
