"""Child process: load one side, generate once, print the peak resident memory as JSON.

Run by :func:`bench.latency.interleave.peak_memory`; memory of several models in one process cannot be told apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.deployment import Deployment
from bench.errors import run_child
from bench.process.peak import peak_bytes


def main(arguments: dict[str, Any]) -> dict[str, int]:
    """``arguments``: kind, path, precision, deployment (the fields of one), batch, prompt, new_tokens."""
    from runtime.generate import generate
    from runtime.session import Session

    path, where = Path(arguments["path"]), Deployment(**arguments["deployment"])
    opener: Callable[[], Session]
    if arguments["kind"] == "onnxruntime":
        import runtime.loading  # noqa: F401  (what it loads is not the folder's memory)

        opener = partial(where.open, path)
    elif arguments["kind"] == "pytorch":
        from runtime.torch_session import TorchSession

        opener = partial(TorchSession, path, arguments["precision"], where.device, threads=where.threads)
    else:
        from bench.peers.optimum_ort import OptimumSession

        opener = partial(OptimumSession, path, where.threads)
    baseline = psutil.Process().memory_info().rss
    session = opener()
    prompts = [[1 + k % 50 for k in range(arguments["prompt"])] for _ in range(arguments["batch"])]
    generate(session, prompts, arguments["new_tokens"])
    return {"peak_bytes": peak_bytes(), "baseline_bytes": baseline}


if __name__ == "__main__":
    sys.exit(run_child(lambda: print(json.dumps(main(json.loads(sys.argv[1]))))))
