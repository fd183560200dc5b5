"""Child process: load one side, generate once, print the peak resident memory as JSON.

Run by :func:`bench.latency.interleave.peak_memory`; memory of several models in one process cannot be told apart.
"""

from __future__ import annotations

import json
import sys
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

    session: Session
    where = Deployment(**arguments["deployment"])
    if arguments["kind"] == "onnxruntime":
        baseline = psutil.Process().memory_info().rss
        session = where.open(Path(arguments["path"]))
    elif arguments["kind"] == "pytorch":
        from runtime.torch_session import TorchSession

        baseline = psutil.Process().memory_info().rss
        session = TorchSession(
            Path(arguments["path"]),
            arguments["precision"],
            where.device,
            threads=where.threads,
        )
    else:
        from bench.peers.optimum_ort import OptimumSession

        baseline = psutil.Process().memory_info().rss
        session = OptimumSession(Path(arguments["path"]), where.threads)
    prompts = [[1 + k % 50 for k in range(arguments["prompt"])] for _ in range(arguments["batch"])]
    generate(session, prompts, arguments["new_tokens"])
    return {"peak_bytes": peak_bytes(), "baseline_bytes": baseline}


if __name__ == "__main__":
    sys.exit(run_child(lambda: print(json.dumps(main(json.loads(sys.argv[1]))))))
