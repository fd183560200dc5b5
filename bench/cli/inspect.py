"""``llama-onnx inspect``: a folder's manifest as a page, after every file was checked against its SHA-256.

Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.cli.output import show
from bench.progress import hashing

if TYPE_CHECKING:
    from export.manifest import Manifest

HELP = "show what is in an exported folder and check every file's SHA-256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", type=Path, help="the exported folder, ours or a third party's")


def run(args: argparse.Namespace) -> int:
    """Check and print."""
    from runtime.loading import read_folder

    folder = args.folder.expanduser()
    with hashing(folder) as on_chunk:
        manifest = read_folder(folder, progress=on_chunk)
    show(args, asdict(manifest), lambda console: render(manifest, console))
    return 0


def render(manifest: Manifest, console: Console) -> None:
    """A page for a terminal."""
    ours = bool(manifest.weights_sha256)
    title = f"{manifest.model_name}, " + ("every file as published" if ours else "a third-party export")
    table = Table(title=escape(title), show_header=False, title_justify="left")
    kv = manifest.kv
    identity = f"SHA-256 {manifest.weights_sha256[:16]}…" if ours else "unknown"
    q = manifest.quantisation
    rows = {
        "weights": manifest.weights_origin,
        "identity": f"{identity} over {manifest.parameters:,} parameters",
        "precision, target": f"{manifest.precision}, {manifest.target}, opset {manifest.opset}",
    }
    oldest = manifest.oldest_runtime
    rows["onnxruntime"] = f"{oldest} or newer: {manifest.oldest_because}" if oldest else "oldest version not known"
    if q:
        rows["quantised"] = (
            f"{q.method}, blocks of {q.block_size}, accuracy level {q.accuracy_level}, zero points {q.zero_points}, "
            f"lm_head {q.lm_head}, embedding {q.embedding}, kept in floats: {q.keep_float}"
        )
    windows = [w for w in kv.windows if w is not None]
    rows |= {
        "attention": f"{manifest.attention}, padding: {manifest.padding}, logits of {manifest.decode_logits} positions",
        "context": f"{manifest.context_length:,} tokens, vocabulary {manifest.vocab_size:,}",
        "graph": f"{manifest.node_count} nodes: " + ", ".join(f"{n} {op}" for op, n in manifest.fused_ops.items()),
        "KV cache": f"{kv.layers} layers x {kv.kv_heads} heads x {kv.head_dim}, {kv.dtype}, "
        f"{kv.bytes_per_token():,} bytes a token, "
        + ("past and present in one buffer" if kv.shared_buffer else "joined by Concat")
        + (f" of {kv.cache_length:,} slots" if kv.cache_length else "")
        + (f"; {len(windows)} layers keep {windows[0]:,} tokens" if windows else ""),
        "files": ", ".join(f"{name} ({entry.size:,})" for name, entry in manifest.files.items()),
    }
    if ours:
        rows["made"] = f"{manifest.created_utc} by " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
    if manifest.notes:
        rows["notes"] = "\n".join(manifest.notes)
    for key, value in rows.items():
        table.add_row(key, Text(value))
    console.print(table)
