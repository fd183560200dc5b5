"""What ONNX Runtime's own profile of a session says: time by operator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def operator_times(profile: Path, runs: int) -> dict[str, tuple[float, float]]:
    """Per operator, over the last ``runs`` runs: microseconds in its kernels and nodes, both a run; longest first.

    ``whole`` is the run itself, once. The file is Chrome's trace format, times in microseconds.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    last = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: float(e["ts"]))[-runs:]
    found: dict[str, list[float]] = {"whole": [sum(r["dur"] for r in last), len(last)]}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= last[0]["ts"]:
            row = found.setdefault(event["args"]["op_name"], [0.0, 0.0])
            row[0] += event["dur"]
            row[1] += 1
    longest = sorted(found.items(), key=lambda item: -item[1][0])
    return {name: (time / len(last), count / len(last)) for name, (time, count) in longest}


def profiled_run(
    session: Any, rows: list[list[int]], runs: int, counted: int, prefill: bool
) -> dict[str, tuple[float, float]]:
    """The same of prefills of ``rows``, or of decode steps after one.

    Args:
        session: opened with ``profile``, which ends here.
        rows: prompts.
        runs: prefills or steps.
        counted: of them the last ones that count, once warm.
        prefill: which.
    """
    for _ in range(runs if prefill else 1):
        session.prefill(rows, reserve=runs + 1)
    for _ in range(0 if prefill else runs):
        session.step([5] * len(rows))
    return operator_times(session.end_profile(), counted)
