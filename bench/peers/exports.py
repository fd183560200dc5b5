"""How others export: optimum (plain, O1 to O3) in this process, onnxruntime-genai's builder in an environment apart.

genai's builder wants another transformers than optimum does, so the two never share one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from bench.process.child import json_of

GENAI_SCRIPT = """
import json, runpy, sys, time
started = time.perf_counter()
source, out, precision, peak = sys.argv[1:5]
sys.argv = ["builder", "-i", source, "-o", out, "-p", precision, "-e", "cpu", "-c", out + ".cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
peak_bytes = runpy.run_path(peak)["peak_bytes"]()
print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes}))
"""
"""Run with ``python -c``: source, out, precision and the path of :mod:`bench.process.peak`; the last line is seconds
and peak resident bytes as JSON."""
PEAK = Path(__file__).resolve().parents[1] / "process" / "peak.py"


def optimum_export(checkpoint: Path, out: Path, level: str) -> None:
    """optimum's own export; ``level`` is ``plain`` or its optimisation level (``O2``).

    Raises:
        MissingOptimumError: there is no optimum here.
    """
    from export.optimum_adapter import require_optimum  # transformers

    require_optimum("optimum's own export")
    from optimum.exporters.onnx import main_export

    options = {"no_post_process": True} if level == "plain" else {"optimize": level}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer notes and deprecations of the TorchScript exporter
        main_export(str(checkpoint), str(out), task="text-generation-with-past", do_validation=False, **options)


def genai_export(python: Path, checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    """onnxruntime-genai's builder, run by ``python``; returns ``seconds`` and ``peak_bytes``.

    Raises:
        BenchError: it failed; the last line of its output is quoted.
    """
    found: dict[str, Any] = json_of([str(python), "-c", GENAI_SCRIPT, str(checkpoint), str(out), precision, str(PEAK)])
    return found
