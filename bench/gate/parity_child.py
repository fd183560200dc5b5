"""Child process of ``llama-onnx compare --model``: the suite's gate for the candidate, written as JSON.

A process of its own, so that torch and a second session do not share the machine with the pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(a: dict[str, Any]) -> int:
    """``a``: model, exported, provider, threads, profile, dataset, out. Errors of ours are one line each."""
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
    except Exception as error:
        code = getattr(type(error), "exit_code", None)
        if not isinstance(code, int):
            raise
        print(f"error: {error}", file=sys.stderr)
        return code
    finally:
        run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
