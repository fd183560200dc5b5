"""Child process of ``llama-onnx compare --model``: the suite's gate for the candidate, written as JSON.

A process of its own, so that torch and a second session do not share the machine with the pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.errors import run_child


def main(a: dict[str, Any]) -> None:
    """``a``: model, exported, provider, threads, profile, dataset, out."""
    from bench.suite.run import Options, Run
    from reports.publish import write_atomically

    options = Options(
        model=a["model"],
        exported=Path(a["exported"]),
        provider=a["provider"],
        threads=a["threads"],
        profile=a["profile"],
        dataset=Path(a["dataset"]) if a["dataset"] else None,
    )
    run = Run(options)
    try:
        write_atomically(Path(a["out"]), run.gate().model_dump_json(indent=1) + "\n")
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(json.loads(sys.argv[1]))))
