"""What was made: the ``manifest.json`` of an exported folder. Standard library only, versioned.

``runtime`` reads a folder through this module alone, so a folder made elsewhere needs nothing but this file.
Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
GENAI_CONFIG = "genai_config.json"
DECODE_GRAPH, SCORING_GRAPH = "model.onnx", "model_scoring.onnx"
"""File names of our own exports; optimum's decoder is called the same."""
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer.model", "tekken.json", "normalizer.json", "emoji.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "byte_maps.json", "dict.txt", "entity_vocab.json"),
    *("sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "spm_char.model"),
    *("source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json"),
)
"""Files that transformers' tokenizer classes read their vocabulary from, but for pickles; ``*`` is a version."""
CHAT_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
"""Where one is there, transformers does not read the template in tokenizer_config.json."""
TOKENIZER_FILES = (
    *(*VOCABULARIES, *CHAT_TEMPLATES, "chat_template.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""All that belongs to a tokenizer."""
SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""What belongs to a model beside its weights: fetched from the hub, exported, hashed, compared."""
_CHUNK = 1 << 20
_CPP = re.compile(r" ?/onnxruntime_src/\S+:\d+ \S.*?\)(?: const)?(?: \[with [^\]]*\])? ")
"""A file of ONNX Runtime's and the signature of its function."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RELEASE = re.compile(r"(\d+(?:\.\d+)+)(?:[.-]?(dev|a|b|rc))?")


class UserError(Exception):
    """Root of the errors in ``export``, ``runtime`` and ``bench`` that the user can mend: a line or two, no traceback.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 2


def standard(domain: str) -> str:
    """An operator's domain; ONNX's own has two names."""
    return "" if domain == "ai.onnx" else domain


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, its name where it says nothing.

    A line that ends in a colon has its reason in the next (transformers 5 about a field of a configuration). ONNX
    Runtime's place in its own sources goes, and the middle of a line that is still long: it begins with a path and ends
    with the cause.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    line = _CPP.sub(" ", f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0])
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-175:]}"


def release(version: str) -> tuple[int, ...]:
    """What versions are ordered by: 1.33.0.dev20261101 is newer than 1.32.1 and older than 1.33.0.

    Raises:
        ValueError: no version.
    """
    found = _RELEASE.match(version)
    if found is None:
        raise ValueError(f"{version[:40]!r} is no version")
    numbers = [int(n) for n in found[1].split(".")]
    return (*[*numbers, 0, 0][:3], found[2] is None)


def files_of(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files of a folder that are in one of the lists above, as relative POSIX paths, sorted."""
    return sorted({p.relative_to(folder).as_posix() for name in patterns for p in folder.glob(name) if p.is_file()})


class ManifestError(UserError):
    """A folder that is not an export, or is not the one that its manifest describes."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class KVLayout:
    """Shape of the KV cache: per layer a key and a value of ``[batch, kv_heads, capacity, head_dim]``.

    ``shared_buffer`` says that past and present may be bound to the same memory; ``cache_length`` is the capacity where
    the graph fixes it. ``windows``, one a layer, are the tokens that the decode graph keeps at least of a layer which
    drops older ones, None where it keeps all; () where every layer does.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    shared_buffer: bool
    cache_length: int | None = None
    windows: tuple[int | None, ...] = ()

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row occupies over all layers, key and value."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one element."""
ONNX_TYPE = {"fp32": 1, "fp16": 10, "bf16": 16}
"""Numbers among ONNX's element types."""
ATTENTIONS = ("GroupQueryAttention", "Attention", "MultiHeadAttention")
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
MATMULS = ("MatMul", "MatMulNBits", "GatherBlockQuantized")
"""Operators that are a whole attention, a whole norm, or read a weight."""


@dataclass(frozen=True)
class Weight:
    """One initialiser of the graphs and the checkpoint tensors that it was made of.

    ``transform`` is ``copy``, ``transpose``, ``concat_transpose`` (rows joined, then transposed), ``concat``, ``rope``
    (computed from the configuration, no source), or ``codes``, ``scales``, ``zero_points``: the parts of a weight
    quantised to ``bits`` in MatMulNBits' layout. ``offsets`` ``[blocks, rows]`` stand for zero points that are real
    numbers: ``(8 - zero point) x scale``. ``codes_transposed`` ``[columns, rows]`` and ``scales_transposed``
    ``[blocks, rows]`` are the parts in DequantizeLinear's layout: signed codes around 0, of dtype ``int8`` or ``int4``
    (two a byte over the whole tensor, the first in the low nibble).
    """

    name: str
    sources: tuple[str, ...]
    transform: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    bits: int = 0


@dataclass(frozen=True)
class Quantisation:
    """How weights became integers; see :class:`export.spec.ExportSpec` for the values.

    ``weights``, ``lm_head`` and ``embedding`` are ``float``, ``int8`` or ``int4``; ``zero_points`` is ``integer``,
    ``float`` or ``none``.
    """

    weights: str
    method: str
    block_size: int
    accuracy_level: int
    zero_points: str
    keep_float: str
    lm_head: str
    embedding: str


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader of the folder has to know.

    ``precision`` is that of the weights, ``activations`` that of everything else. ``attention`` names the operator:
    ``GroupQueryAttention``, ``Attention`` or ``unfused``. ``padding`` is ``right`` where the graph reads right-padded
    batches only, else ``any``. ``decode_logits`` is ``last`` (one position a row) or ``all``. ``notes`` holds what a
    reader should know besides: choices made, things not certain. ``oldest_runtime`` is the oldest ONNX Runtime that
    computes the graphs right and ``oldest_because`` the operator that demands it (:mod:`export.oldest_runtime`); both
    are empty where that is not known, as in manifests written before there were such fields.
    """

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
    activations: str
    quantisation: Quantisation | None
    target: str
    attention: str
    padding: str
    decode_logits: str
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
    notes: tuple[str, ...] = ()
    oldest_runtime: str = ""
    oldest_because: str = ""

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have, prompt and answer: the model's context, or less where the cache is shorter."""
        return min(self.context_length, self.kv.cache_length or self.context_length)

    @property
    def without_lists(self) -> Manifest:
        """The same without the lists of weights and files, which may be long: all that a session reads."""
        return replace(self, weights=(), files={})

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


def require_folder(path: Path) -> None:
    """Refuse a folder that is not there.

    Raises:
        ManifestError: it is not.
    """
    if not path.is_dir():
        raise ManifestError(f"no exported folder at {path}; make one with: llama-onnx export MODEL {path}")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the form of a folder's manifest (hashes are :func:`verify_files`' business).

    Raises:
        ManifestError: no folder, no manifest, another schema version, a missing or ill-typed field.
    """
    path = folder / MANIFEST_NAME
    require_folder(folder)
    if path.exists() and not path.is_file():  # a pipe would block the reader, a device never end
        raise ManifestError(f"{path} cannot be read, it is no regular file; copy the folder whole")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} has no {MANIFEST_NAME}, so it is not an export of ours; "
            f"make one with: llama-onnx export MODEL OUT"
        ) from None
    except OSError as e:
        raise ManifestError(f"{path} cannot be read ({e.strerror}); copy the folder whole") from None
    except (ValueError, RecursionError) as e:  # bad UTF-8, bad JSON, a number of 5000 digits, a million brackets
        raise ManifestError(f"{path} is not valid JSON ({e}); export again") from None
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        found = raw.get("schema_version") if isinstance(raw, dict) else None
        raise ManifestError(
            f"{path} has schema version {found!r}, this tool reads {SCHEMA_VERSION}; export again with this version"
        )
    missing = [f.name for f in fields(Manifest) if f.default is MISSING and f.name not in raw]
    if missing:
        raise ManifestError(f"{path} lacks {', '.join(missing)}; export again")
    try:
        manifest = manifest_of(raw)
        if manifest.oldest_runtime:
            release(manifest.oldest_runtime)
        if manifest.kv.dtype not in DTYPE_BYTES:
            raise TypeError(f"kv.dtype: {manifest.kv.dtype[:40]!r} must be one of {', '.join(DTYPE_BYTES)}")
        for role in ("decode_graph", "scoring_graph", "data_file"):
            name = getattr(manifest, role)
            if name not in manifest.files:
                raise TypeError(f"{role}: {name[:40]!r} is not among the files")
            if role != "data_file" and not name.endswith(".onnx"):  # what is looked at before it is opened
                raise TypeError(f"{role}: {name[:40]!r} does not end in .onnx")
        return manifest
    except (TypeError, ValueError) as e:
        raise ManifestError(f"{path} has a field of the wrong form ({e}); export again") from None


def manifest_of(raw: Mapping[str, Any]) -> Manifest:
    """A manifest from the values of its JSON.

    Raises:
        TypeError: an ill-typed field, named.
    """
    kinds = get_type_hints(Manifest)
    return Manifest(**{name: _typed(raw[name], kind, name) for name, kind in kinds.items() if name in raw})


def _typed(value: Any, kind: Any, where: str) -> Any:
    """``value`` from JSON as the annotated type ``kind``; TypeError names the place. No number here is negative."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:  # X | None
        return None if value is None else _typed(value, parts[0], where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(v, parts[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _typed(v, parts[1], f"{where}[{name!r}]") for name, v in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if lacking := {f.name for f in fields(kind) if f.default is MISSING} - set(value):
            raise TypeError(f"{where} lacks {', '.join(sorted(lacking))}")
        if strange := set(value) - set(hints):
            raise TypeError(f"{where} has the unknown {', '.join(sorted(strange))[:80]}")
        return kind(**{name: _typed(v, hints[name], f"{where}.{name}") for name, v in value.items()})
    # `type() is`: True is an int to isinstance.
    if type(value) is not kind or (kind is int and value < 0):
        raise TypeError(f"{where}: {str(value)[:40]!r} is no {getattr(kind, '__name__', kind)}")
    return value


def is_hub_blob(home: Path, target: Path) -> bool:
    """Whether a link in ``home`` ends where the Hugging Face hub's cache keeps its files.

    Args:
        home: a folder in ``REPO/snapshots``, without links in its path.
        target: the link's end, ``REPO/blobs/HASH``, without links in its path.
    """
    repository = target.parent.parent
    blob = target.parent.name == "blobs" and _BLOB.fullmatch(target.name) is not None
    return blob and home.is_relative_to(repository / "snapshots")


def verify_files(
    folder: Path,
    manifest: Manifest,
    progress: Callable[[int], None] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Check that each file of the manifest is there with the size and SHA-256 it was published with.

    Args:
        folder: of the files.
        manifest: what they should be.
        progress: called with the bytes of each chunk hashed.
        known: SHA-256 by name of files that the caller has just hashed; they are not read again.

    Raises:
        ManifestError: names the first file that differs.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or str(inside) != name:
            raise ManifestError(f"{folder}: the manifest names {name!r}, which is not a plain file name; export again")
        if not path.is_file():
            raise ManifestError(f"{folder}: {name} is missing; export again or copy the folder whole")
        size = path.stat().st_size
        if size != entry.size:
            raise ManifestError(
                f"{folder}: {name} has {size} bytes, the manifest says {entry.size}; export again or copy it again"
            )
        if ((known or {}).get(name) or sha256_of(path, progress)) != entry.sha256:
            raise ManifestError(
                f"{folder}: the SHA-256 of {name} is not the manifest's: the file was changed or damaged; export again"
            )
