"""Convert -> write -> check -> publish, all or nothing.

A folder appears under its name only when every file in it is complete and hashed. Killed halfway, nothing is left
under OUT. Try: ``llama-onnx export demo /tmp/demo-onnx``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from transformers import AutoConfig, PretrainedConfig

from export.cache import publish
from export.check import check_graph
from export.convert import OPSET, TORCH_DTYPE, Conversion, convert, head_dim_of
from export.errors import BrokenCheckpointError, DestinationError
from export.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    KVLayout,
    Manifest,
    ManifestError,
    Weight,
    read_manifest,
    sha256_of,
    write_manifest,
)
from export.source import Source, resolve
from export.spec import ExportSpec
from export.weights import Checkpoint, match_names, write_data

DECODE_GRAPH = "model.onnx"
SCORING_GRAPH = "model_scoring.onnx"
DATA_FILE = "model.onnx.data"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
_TOOLS = ("llama-onnx-bench", "torch", "transformers", "optimum", "optimum-onnx", "onnx", "safetensors")
Progress = Callable[[int, int], None]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load_config(source: Source) -> PretrainedConfig:
    """The checkpoint's transformers configuration.

    Raises:
        BrokenCheckpointError: transformers does not know the architecture or cannot read the file.
    """
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as e:
        first = str(e).splitlines()[0][:200]
        raise BrokenCheckpointError(f"{source.folder}/config.json cannot be used: {first}") from None


def eos_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """End-of-sequence token ids: generation_config.json decides before config.json, as in transformers."""
    value: Any = config.eos_token_id
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", value)
        except ValueError as e:
            raise BrokenCheckpointError(f"{path} is not valid JSON ({e}); copy it again") from None
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _check_destination(out: Path, spec: ExportSpec, force: bool) -> Manifest | None:
    """The manifest of an equal export that is already there, None when OUT is free; an error otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise DestinationError(f"{out} exists and is a file; choose another OUT")
    try:
        manifest = read_manifest(out)
    except ManifestError:
        raise DestinationError(
            f"{out} exists and is not an export of ours; nothing was changed, choose another OUT"
        ) from None
    if force:
        return None
    if manifest.spec_digest == spec.digest:
        return manifest
    asked = manifest.spec
    raise DestinationError(
        f"{out} holds another export ({asked.get('model')}, {asked.get('precision')}, {asked.get('target')}); "
        f"choose another OUT, or replace it with --force"
    )


def _check_disk(out: Path, needed: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DestinationError(
            f"the export needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; make room or choose "
            f"another OUT"
        )


def export_model(
    spec: ExportSpec,
    out: Path,
    *,
    force: bool = False,
    source: Source | None = None,
    status: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> tuple[Manifest, bool]:
    """Export a checkpoint to ``out``.

    Args:
        spec: what to make.
        out: the folder to appear. An equal export that is there already is kept.
        force: replace another export of ours (never anything else).
        source: a checkpoint that was resolved before; by default ``spec.model`` is resolved.
        status: told what is being done.
        progress: told (bytes written, bytes in all).

    Returns:
        The manifest, and whether something was written (False: an equal export was there).

    Raises:
        ExportError: see :mod:`export.errors`.
    """
    out = out.expanduser()
    existing = _check_destination(out, spec, force)
    source = source or resolve(spec.model, spec.revision, status)
    if existing is not None:
        if existing.source_key == source.content_key:
            return existing, False
        raise DestinationError(
            f"{out} holds an export of {spec.model} as it was before its files changed; "
            f"replace it with --force, or choose another OUT"
        )
    config = load_config(source)
    status("tracing the fused graph")
    conversion = convert(config, spec.precision, DATA_FILE)
    checkpoint = Checkpoint(source.folder)
    match_names(conversion.recipes, checkpoint, config.tie_word_embeddings)
    _check_disk(out, conversion.data_bytes + (64 << 20))
    counts = check_graph(conversion.decode, config)
    check_graph(conversion.scoring, config)

    status("writing the weights")
    done = 0

    def on_bytes(n: int) -> None:
        nonlocal done
        done += n
        progress(done, conversion.data_bytes)

    if force and out.exists():
        shutil.rmtree(out)
    with publish(out) as work:
        data_sha, identity = write_data(
            conversion,
            checkpoint,
            work / DATA_FILE,
            TORCH_DTYPE[spec.precision],
            config.tie_word_embeddings,
            on_bytes,
        )
        onnx.save_model(conversion.decode, work / DECODE_GRAPH)
        onnx.save_model(conversion.scoring, work / SCORING_GRAPH)
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, work / name)
        status("hashing")
        files = {
            p.name: FileEntry(p.stat().st_size, data_sha if p.name == DATA_FILE else sha256_of(p))
            for p in sorted(work.iterdir())
        }
        manifest = _manifest(spec, source, config, conversion, counts, identity, files)
        write_manifest(work, manifest)
    return manifest, True


def _manifest(
    spec: ExportSpec,
    source: Source,
    config: PretrainedConfig,
    conversion: Conversion,
    counts: dict[str, int],
    identity: str,
    files: dict[str, FileEntry],
) -> Manifest:
    # Not read whole in a decode step: the embedding gathers one row, the rotary tables too.
    skipped = ("model.embed_tokens.weight", "model.rope_cos", "model.rope_sin")
    seen: set[str] = set()
    parameters = 0
    for recipe in conversion.recipes:  # a tied head is the embedding's tensor again
        if recipe.sources and not seen.issuperset(recipe.sources):
            parameters += math.prod(recipe.shape)
        seen.update(recipe.sources)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        spec=asdict(spec),
        spec_digest=spec.digest,
        model_name=source.name,
        model_type=config.model_type,
        weights_sha256=identity,
        weights_origin=source.origin,
        source_key=source.content_key,
        parameters=parameters,
        precision=spec.precision,
        target=spec.target,
        opset=OPSET,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        eos_token_ids=eos_ids(source.folder, config),
        decode_graph=DECODE_GRAPH,
        scoring_graph=SCORING_GRAPH,
        data_file=DATA_FILE,
        inputs=tuple(i.name for i in conversion.decode.graph.input),
        outputs=tuple(o.name for o in conversion.decode.graph.output),
        kv=KVLayout(
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim_of(config),
            dtype=spec.precision,
            shared_buffer=True,
        ),
        fused_ops=counts,
        node_count=len(conversion.decode.graph.node),
        decode_weight_bytes=sum(r.nbytes for r in conversion.recipes if r.name not in skipped),
        weights=tuple(
            Weight(r.name, r.sources, r.transform, r.shape, spec.precision, r.offset, r.nbytes)
            for r in conversion.recipes
        ),
        versions={name: _version(name) for name in _TOOLS},
        files=files,
    )
