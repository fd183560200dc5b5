"""How others export: optimum (plain, O1 to O3) in this process, onnxruntime-genai's builder in an environment apart.

genai's builder wants another transformers than optimum does, so the two never share one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

GENAI_SCRIPT = """
import json, pathlib, runpy, sys, time
started = time.perf_counter()
source, out, precision = sys.argv[1:4]
sys.argv = ["builder", "-i", source, "-o", out, "-p", precision, "-e", "cpu", "-c", out + ".cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
peak = int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak}))
"""
"""Run with ``python -c``: source, out and precision; the last line is seconds and peak resident bytes as JSON."""


def optimum_export(checkpoint: Path, out: Path, level: str) -> None:
    """optimum's own export; ``level`` is ``plain`` or its optimisation level (``O2``)."""
    from optimum.exporters.onnx import main_export

    options = {"no_post_process": True} if level == "plain" else {"optimize": level}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer notes and deprecations of the TorchScript exporter
        main_export(str(checkpoint), str(out), task="text-generation-with-past", do_validation=False, **options)
