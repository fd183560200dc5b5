"""ExportedModel -> Session -> tokens with time stamps, on ONNX Runtime or on PyTorch.

The only package that imports onnxruntime; takes nothing from ``export`` but ``export.manifest``.
``runtime.load(folder)`` opens a session that also serves as the model of ``transformers.pipeline``.
Try: ``llama-onnx generate FOLDER "The capital of France is"``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import export.manifest  # noqa: F401 - switches telemetry off before onnxruntime is loaded

_PUBLIC = {
    "load": "runtime.loading",
    "Sampling": "runtime.sampling",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first asked for: importing the package stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
