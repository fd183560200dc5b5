"""Run a command that dies with the process that started it: a measurement that nobody waits for would disturb the next.

``python -P bench/process/tied.py COMMAND ...`` becomes the command. Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere
the command is run as it is.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.execv(sys.argv[1], sys.argv[1:])
