"""What is asked for: a frozen, validated description of one export.

Try: ``python -c "from export.spec import ExportSpec; print(ExportSpec('demo').digest)"``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from export.errors import ExportError

PRECISIONS = ("fp32", "fp16")
TARGETS = ("ort",)


@dataclass(frozen=True)
class ExportSpec:
    """One export, as asked for.

    Args:
        model: ``demo``, a local folder, a GGUF file or a hub id.
        precision: storage and compute type of the weights, one of :data:`PRECISIONS`.
        target: ``ort`` (com.microsoft fused operators).
        revision: branch, tag or commit when ``model`` is a hub id.

    Raises:
        ExportError: for a precision or target that is not known.
    """

    model: str
    precision: str = "fp32"
    target: str = "ort"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(f"unknown precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.target not in TARGETS:
            raise ExportError(f"unknown target {self.target!r}; choose one of {', '.join(TARGETS)}")
        if not self.model:
            raise ExportError("no model given; pass a folder, a GGUF file, a hub id or 'demo'")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the fields that decide what is written; equal digests mean equal requests."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
