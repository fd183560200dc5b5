"""``llama-onnx export``: a checkpoint becomes a folder of ONNX graphs, weights and a manifest.

Try: ``llama-onnx export demo /tmp/demo-onnx``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from bench.cli.output import show, status
from bench.progress import progress
from export.source import add_option

HELP = "export a checkpoint to ONNX: one folder with fused attention and a KV cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What :class:`export.spec.ExportSpec` asks for, and where the folder goes."""
    add = parser.add_argument
    add("model", help="'demo', a checkpoint folder, a .gguf file or a hub id")
    add("out", type=Path, help="the folder to create")
    add("--precision", default="fp32", help="fp32, fp16, bf16, int8 or int4 (default fp32)")
    add(
        "--target",
        default="ort",
        help="ort (fused operators of ONNX Runtime; default), tensorrt (standard operators, opset 24) or plain "
        "(optimum's own graph, for any decoder)",
    )
    add("--revision", help="branch, tag or commit of a hub id")
    add(
        "--provider", default="any", help="any (default), or cuda: the graph has to run on ONNX Runtime's CUDA provider"
    )
    add(
        "--cache-length",
        type=int,
        metavar="N",
        help="target tensorrt: tokens that a row of the KV cache holds, prompt and answer (default: the context, at "
        "most 4096)",
    )
    add(
        "--window-cache",
        action="store_true",
        help="target ort: layers with an attention window (Mistral, Qwen) keep no more tokens than it has",
    )
    add_option(add)
    add("--force", action="store_true", help="replace an earlier export at OUT")
    weights = parser.add_argument_group("int8 and int4")
    weights.add_argument("--method", help="rtn, hqq, kquant or gptq (default: rtn for int8, hqq for int4)")
    weights.add_argument(
        "--block-size", type=int, metavar="N", help="weights that share a scale (default: 16 for int8, 32 for int4)"
    )
    weights.add_argument(
        "--accuracy-level", type=int, metavar="N", help="multiply in the activations' type (0) or in int8 (4, default)"
    )
    weights.add_argument(
        "--zero-points",
        metavar="KIND",
        help="integer, float, or none: symmetric, fastest, all that TensorRT takes (default: none with --target "
        "tensorrt, float for int4 by hqq and kquant, else integer)",
    )
    weights.add_argument(
        "--keep-float",
        metavar="PARTS",
        help="parts that are not quantised: none, or a list of qkv, o, gate, up, down, first:N, last:N",
    )
    weights.add_argument(
        "--activations",
        metavar="TYPE",
        help="type of activations and KV cache: fp32 (default; with --target tensorrt fp16), fp16 or bf16",
    )
    weights.add_argument(
        "--lm-head", metavar="TYPE", help="float, int8 or int4 (default: int8 with --precision int4, else float)"
    )
    weights.add_argument("--embedding", metavar="TYPE", help="float (default) or int8")


def run(args: argparse.Namespace) -> int:
    """Export, unless OUT holds that very export already."""
    from export.pipeline import export_model
    from export.spec import ExportSpec

    spec = ExportSpec(**{f.name: getattr(args, f.name) for f in fields(ExportSpec)})
    calibration: Sequence[str] = ()
    if spec.method == "gptq":
        from bench.data.loading import load_shipped

        calibration = load_shipped().calibration()
    with progress("weights", unit="bytes") as bar:
        manifest, written = export_model(
            spec,
            args.out,
            force=args.force,
            calibration=calibration,
            allow_pickle=args.allow_pickle,
            status=status,
            progress=bar.at,
        )
    verb = "exported" if written else "already there:"
    fused = ", ".join(f"{n} {op}" for op, n in manifest.fused_ops.items())
    show(
        args,
        {"folder": str(args.out), "written": written, "manifest": asdict(manifest)},
        f"{verb} {manifest.model_name} {manifest.precision} at {args.out}: {manifest.node_count} nodes ({fused})",
    )
    return 0
