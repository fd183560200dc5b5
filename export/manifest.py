"""What was made: the ``manifest.json`` of an exported folder. Standard library only, versioned.

``runtime`` reads a folder through this module alone, so a folder made elsewhere needs nothing but this file.
Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20


class ManifestError(Exception):
    """A folder that is not an export, or is not the one that its manifest describes."""

    exit_code = 2


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class KVLayout:
    """Shape of the KV cache: per layer a key and a value of ``[batch, kv_heads, capacity, head_dim]``.

    ``shared_buffer`` says that past and present may be bound to the same memory.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    shared_buffer: bool

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row occupies over all layers, key and value."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Weight:
    """One initialiser of the graphs and the checkpoint tensors that it was made of.

    ``transform`` is ``copy``, ``transpose``, ``concat_transpose`` (rows joined, then transposed), ``concat``
    or ``rope`` (computed from the configuration, no source).
    """

    name: str
    sources: tuple[str, ...]
    transform: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader of the folder has to know; see the README for each field."""

    schema_version: int
    created_utc: str
    spec: dict[str, Any]
    spec_digest: str
    model_name: str
    model_type: str
    weights_sha256: str
    weights_origin: str
    source_key: str
    parameters: int
    precision: str
    target: str
    opset: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    decode_graph: str
    scoring_graph: str
    data_file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv: KVLayout
    fused_ops: dict[str, int]
    node_count: int
    decode_weight_bytes: int
    weights: tuple[Weight, ...]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """The manifest as indented JSON, newline at the end."""
        return json.dumps(asdict(self), indent=1, sort_keys=False) + "\n"


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 (hex) of a file, read in chunks; ``progress`` is called with the bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and flush it to the disk."""
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as f:
        f.write(manifest.to_json())
        f.flush()
        os.fsync(f.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read and check the form of a folder's manifest (hashes are :func:`verify_files`' business).

    Raises:
        ManifestError: no folder, no manifest, another schema version, a missing or ill-typed field.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ManifestError(f"no exported folder at {folder}; make one with: llama-onnx export MODEL {folder}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} has no {MANIFEST_NAME}, so it is not an export of ours; "
            f"make one with: llama-onnx export MODEL OUT"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ManifestError(f"{path} is not valid JSON ({e}); export again") from None
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        found = raw.get("schema_version") if isinstance(raw, dict) else None
        raise ManifestError(
            f"{path} has schema version {found!r}, this tool reads {SCHEMA_VERSION}; export again with this version"
        )
    missing = [f.name for f in fields(Manifest) if f.name not in raw]
    if missing:
        raise ManifestError(f"{path} lacks {', '.join(missing)}; export again")
    try:
        raw["kv"] = KVLayout(**raw["kv"])
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        raw["weights"] = tuple(
            Weight(**{**w, "sources": tuple(w["sources"]), "shape": tuple(w["shape"])}) for w in raw["weights"]
        )
        for name in ("inputs", "outputs", "eos_token_ids"):
            raw[name] = tuple(raw[name])
        return Manifest(**{f.name: raw[f.name] for f in fields(Manifest)})
    except (TypeError, AttributeError, KeyError) as e:
        raise ManifestError(f"{path} has a field of the wrong form ({e}); export again") from None


def verify_files(folder: Path, manifest: Manifest, progress: Callable[[int], None] | None = None) -> None:
    """Check that each file of the manifest is there with the size and SHA-256 it was published with.

    Raises:
        ManifestError: names the first file that differs.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise ManifestError(f"{folder}: the manifest names {name!r}, which is not a plain file name; export again")
        if not path.is_file():
            raise ManifestError(f"{folder}: {name} is missing; export again or copy the folder whole")
        size = path.stat().st_size
        if size != entry.size:
            raise ManifestError(
                f"{folder}: {name} has {size} bytes, the manifest says {entry.size}; export again or copy it again"
            )
        if sha256_of(path, progress) != entry.sha256:
            raise ManifestError(
                f"{folder}: the SHA-256 of {name} is not the manifest's: the file was changed or damaged; export again"
            )
