"""What ONNX Runtime's own profile of a session says: time by operator."""

from __future__ import annotations

import json
from pathlib import Path


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
