"""A model's export, made once and kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import export
from export.architectures import has_fused_export
from export.cache import cache_dir
from export.manifest import sha256_of
from export.pipeline import export_model, load_config
from export.source import Source
from export.spec import ExportSpec


@cache
def exporter_digest(package: Path = Path(export.__file__).parent) -> str:
    """SHA-256 (hex) over the exporter's own source: what an earlier revision exported is not this one's."""
    files = sorted(package.rglob("*.py"))
    named = "".join(f"{p.relative_to(package).as_posix()} {sha256_of(p)}\n" for p in files)
    return hashlib.sha256(named.encode()).hexdigest()


def exported_folder(
    source: Source,
    model: str,
    precision: str,
    device: str,
    target: str = "auto",
    method: str | None = None,
    calibration: Callable[[], Sequence[str]] = tuple,
    status: Callable[[str], None] = lambda _s: None,
) -> Path:
    """The folder of a model in one precision; exported now where this exporter has not made it yet.

    Args:
        source: what ``model`` names.
        model: as the user named it.
        precision: of the export.
        device: ``cpu`` or ``cuda``; a graph for the latter has to run on the CUDA provider.
        target: ``auto`` takes fused operators for a model that can have them, else optimum's plain graph.
        method: of int8 and int4.
        calibration: gives gptq's texts.
        status: told what is done.
    """
    if target == "auto":
        target = "ort" if has_fused_export(load_config(source)) else "plain"
    provider = "cuda" if device == "cuda" and target == "ort" else "any"
    spec = ExportSpec(model, precision, target, method=method, provider=provider)
    key = hashlib.sha256((spec.digest + source.content_key + exporter_digest()).encode()).hexdigest()[:12]
    path = cache_dir() / "exports" / f"{source.name.replace('/', '--')}-{precision}-{key}"
    texts = calibration() if spec.method == "gptq" else ()
    export_model(spec, path, source=source, calibration=texts, status=status)
    return path
