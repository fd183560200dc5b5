"""Folder -> session: the manifest is read and every file's hash checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from export.manifest import read_manifest, verify_files

if TYPE_CHECKING:
    from runtime.ort_session import OrtSession


def load(
    folder: str | Path,
    provider: str = "cpu",
    threads: int | None = None,
    verify: bool = True,
    huge_pages: bool = True,
    progress: Callable[[int], None] | None = None,
) -> OrtSession:
    """Open an exported folder on ONNX Runtime.

    Args:
        folder: made by ``llama-onnx export``.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: CPU threads, None for every core.
        verify: compare every file's SHA-256 with the manifest (under a second per GB).
        huge_pages: see :class:`runtime.ort_session.OrtSession`.
        progress: called with the bytes of each chunk hashed.

    Raises:
        ManifestError: not an export, or not the files that it was published with.
        SessionError: see :class:`runtime.ort_session.OrtSession`.
    """
    from runtime.ort_session import OrtSession

    path = Path(folder).expanduser()
    manifest = read_manifest(path)
    if verify:
        verify_files(path, manifest, progress)
    return OrtSession(path, manifest, provider, threads, huge_pages)
