"""``llama-onnx random-model``: real shapes without real weights, to measure export and latency of large models.

Try: ``llama-onnx random-model /tmp/two-layers --layers 2``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from bench.cli.output import show
from bench.progress import progress

HELP = "write a checkpoint with the shape of a real model and random weights"
SHAPES = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-8b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shape, and where."""
    add = parser.add_argument
    add("out", type=Path, help="the folder to create")
    add("--config", default="llama-2-7b", help=f"{', '.join(SHAPES)} (default llama-2-7b)")
    add("--precision", default="fp16", help="fp32, fp16 (default) or bf16")
    add("--layers", type=int, metavar="N", help="fewer layers than the real model has")
    add("--seed", type=int, default=0, metavar="N", help="of the weights (default 0)")


def run(args: argparse.Namespace) -> int:
    """Write it, shard by shard."""
    from export.random_model import make_random_model

    with progress("random weights", unit="bytes") as bar:
        made = make_random_model(args.config, args.out, args.precision, args.layers, seed=args.seed, progress=bar.at)
    show(
        args,
        {**asdict(made), "folder": str(made.folder)},
        f"{made.folder}: {args.config} with random weights, {made.parameters:,} parameters, "
        f"{made.weight_bytes / 1e9:.2f} GB in {made.shards} shards",
    )
    return 0
