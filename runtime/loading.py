"""Folder -> session: what may not be trusted is refused, the manifest read and every hash checked before loading.

A folder without our manifest is described by :mod:`runtime.foreign` instead; it has no hashes to check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from export.manifest import MANIFEST_NAME, Manifest, read_manifest, require_folder, verify_files
from runtime.settings import MoreSettings, SessionSettings

if TYPE_CHECKING:
    from runtime.ort_session import OrtSession


def read_folder(folder: str | Path, verify: bool = True, progress: Callable[[int], None] | None = None) -> Manifest:
    """The manifest of an exported folder, or one derived for a third-party export.

    Args:
        folder: ours, optimum's or onnxruntime-genai's.
        verify: compare every file's SHA-256 with the manifest (under a second per GB); ours only.
        progress: called with the bytes of each chunk hashed.

    Raises:
        ManifestError: no such folder, a broken manifest, or not the files that it was published with.
        SessionError: a folder that may not be trusted, or of a layout that is not known.
    """
    path = Path(folder).expanduser()
    require_folder(path)
    manifest = read_manifest(path) if (path / MANIFEST_NAME).exists() else None
    from runtime.trust import check_folder

    check_folder(path)
    if manifest is None:
        from runtime.foreign import describe

        return describe(path)
    if verify:
        verify_files(path, manifest, progress)
    return manifest


def load(
    folder: str | Path,
    provider: str = "cpu",
    threads: int | None = None,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
    manifest: Manifest | None = None,
    **more: Unpack[MoreSettings],
) -> OrtSession:
    """Open an exported folder on ONNX Runtime.

    Args:
        folder: made by ``llama-onnx export``, by optimum, or by onnxruntime-genai's builder.
        provider, threads, more: see :class:`runtime.settings.SessionSettings`.
        verify: compare every file's SHA-256 with the manifest (under a second per GB).
        progress: called with the bytes of each chunk hashed.
        manifest: what :func:`read_folder` gave for it; the folder is not looked at again (which takes onnx).

    Raises:
        ManifestError: not an export, or not the files that it was published with.
        SessionError: a setting that makes no sense; see :class:`runtime.ort_session.OrtSession`.
    """
    from runtime.ort_session import OrtSession

    settings = SessionSettings(provider, threads, **more)
    path = Path(folder).expanduser()
    return OrtSession(path, manifest or read_folder(path, verify, progress), settings)
