"""SHA-256 of a folder and of a baseline: what results name and certificates cover.

Try: ``python -c "import pathlib, bench.digests as d; print(d.folder_digest(d.hash_folder(pathlib.Path('FOLDER'))))"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.errors import BenchError
from export.manifest import TOKENIZER_FILES, files_of, is_hub_blob, sha256_of

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
Progress = Callable[[int], None]
"""Called with the bytes of each chunk that was hashed."""


class DigestError(BenchError):
    """Nothing there that a digest could cover; ``reason`` is a fixed word for pipelines (``no-folder``, ...)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def hash_folder(folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every file below ``folder`` by its relative POSIX path, sorted.

    Raises:
        DigestError: no such folder, an empty one, a link or something that is no plain file in it.
    """
    if not folder.is_dir():
        raise DigestError("no-folder", f"no folder at {folder}; pass the exported folder")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        blob = path.is_symlink() and path.is_file() and is_hub_blob(path.parent.resolve(), path.resolve())
        if (path.is_symlink() and not blob) or not (path.is_file() or path.is_dir()):
            raise DigestError(
                "not-a-file",
                f"{folder}: {name} is a link out of it or no plain file; a certificate covers plain files, and "
                "links of a repository in the hub's cache to its blobs",
            )
        if path.is_file():
            found[name] = sha256_of(path, progress)
    if not found:
        raise DigestError("no-folder", f"{folder} holds no file; pass the exported folder")
    return found


def folder_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 (hex) over names and digests of a folder's files, as JSON: no name can look like two."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def hash_baseline(checkpoint: Path, progress: Progress | None = None) -> dict[str, dict[str, str]]:
    """SHA-256 of a checkpoint's files: ``{"baseline": {name: hex}, "tokenizer": {name: hex}}``.

    Raises:
        DigestError: no weights in it.
    """
    roles: dict[str, dict[str, str]] = {"baseline": {}, "tokenizer": {}}
    for name in files_of(checkpoint, TOKENIZER_FILES):
        roles["tokenizer"][name] = sha256_of(checkpoint / name, progress)
    for path in sorted(p for p in checkpoint.iterdir() if p.is_file() and p.name not in roles["tokenizer"]):
        if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(("config.json", ".index.json")):
            roles["baseline"][path.name] = sha256_of(path, progress)
    if not any(Path(name).suffix in WEIGHT_SUFFIXES for name in roles["baseline"]):
        raise DigestError("no-baseline", f"{checkpoint} holds no weights; pass the baseline's checkpoint")
    return roles


def baseline_digest(roles: Mapping[str, Mapping[str, str]]) -> str:
    """One SHA-256 (hex) over what :func:`hash_baseline` found."""
    parts = ("baseline", "tokenizer")
    return folder_digest({f"{role}/{name}": digest for role in parts for name, digest in roles[role].items()})
