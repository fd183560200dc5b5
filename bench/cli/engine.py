"""``llama-onnx engine``: an exported folder compiled by TensorRT-RTX without a GPU, for machines that only load.

Try: ``llama-onnx engine FOLDER --sm 89,120 --out /tmp/engines``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bench.cli.numbers import at_least
from bench.cli.output import show, status

if TYPE_CHECKING:
    from runtime.trt_compiler import Compiled

HELP = "compile an exported folder (--target tensorrt) into TensorRT-RTX engines; needs no GPU"
UNTRIED = "compiled without a GPU; neither the engines nor the EPContext models were loaded on one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the GPUs, the workload, and where the engines go."""
    add = parser.add_argument
    add("folder", type=Path, help="the exported folder, of --target tensorrt, with activations in fp16 or bf16")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to create")
    add(
        "--sm",
        default="89",
        metavar="N,...",
        help="GPUs: compute capabilities times 10, of 75, 80, 86, 89, 120, 121 (default 89)",
    )
    add("--batch", type=at_least(1), default=1, metavar="N", help="rows at most (default 1)")
    add(
        "--prompt",
        type=at_least(1),
        metavar="N",
        help="prompt tokens at most (default 1024, or what a row has room for)",
    )
    add(
        "--decode-profile",
        action="store_true",
        help="a second optimisation profile for single tokens; with --batch 1 every layer's weights are kept twice",
    )
    add("--new-tokens", type=at_least(1), default=256, metavar="N", help="tokens to be generated (default 256)")


def run(args: argparse.Namespace) -> int:
    """Compile into a new folder, complete or not there at all.

    Raises:
        DestinationError: DIR is there already.
        CompileError: the compiler refuses the graph, or copies the cache or pulls an attention apart; names the node.
        CompilerMissingError: the compiler is not installed.
    """
    from bench.gate.checks.tensorrt import unintended
    from bench.process.trt_compile import compile_in_child
    from export.cache import publish, require_space
    from export.errors import DestinationError
    from runtime.ep_context import write_ep_context
    from runtime.errors import CompileError, SessionError
    from runtime.loading import read_folder
    from runtime.tensorrt import Shapes, engine_profiles
    from runtime.trt_compiler import UNFUSED_TYPE, engine_file, parse_sms, version

    folder, out, sms = args.folder.expanduser(), args.out.expanduser(), parse_sms(args.sm)
    version()
    if out.exists():
        raise DestinationError(f"{out} is there already; remove it or choose another --out")
    manifest = read_folder(folder)
    if manifest.target != "tensorrt":
        raise SessionError(f"{folder} is of target {manifest.target}; export it with --target tensorrt")
    if manifest.activations == UNFUSED_TYPE:
        raise SessionError(
            f"{folder} computes in {UNFUSED_TYPE}, for which TensorRT has no fused attention; export it with "
            f"--precision fp16 or bf16 (int8 and int4: with --activations)"
        )
    room = manifest.longest_row - args.new_tokens
    if room < (args.prompt or 1):
        asked = f"--prompt {args.prompt} and " if args.prompt else "a prompt and "
        raise SessionError(
            f"{asked}--new-tokens {args.new_tokens} are longer than a row of {folder}, {room + args.new_tokens} tokens"
        )
    prompt = args.prompt or min(1024, room)
    shapes = Shapes((1, args.batch, args.batch), (1, prompt, prompt), args.new_tokens)
    # A decode step is inside of prefill's shapes, which begin at one token; ONNX Runtime only uses the first profile.
    profiles = engine_profiles(manifest, shapes, ("prefill", "decode") if args.decode_profile else ("prefill",))
    graph = folder / manifest.decode_graph
    # Engines hold the weights; so much more for kernels was never needed.
    require_space(out, len(sms) * len(profiles) * (manifest.files[manifest.data_file].size + (64 << 20)), "the folder")
    with publish(out) as work:
        compiled = []
        peaks = []
        for sm in sms:
            status(f"compiling for SM {sm}")
            made, peak = compile_in_child(graph, list(profiles.values()), (sm,), work)
            faults = [*made.faults, *(f for e in made.engines for f in e.faults)]
            if wrong := [(f.where, f.what) for f in faults or unintended(made, manifest)]:
                more = f" (+{len(wrong) - 1} more)" if len(wrong) > 1 else ""
                raise CompileError(f"{graph.name}: {': '.join(wrong[0])}{more}")
            write_ep_context(graph, engine_file(work, sm), sm, made.compiler)
            compiled.append(made)
            peaks.append(peak)
        document = {
            "schema_version": 1,
            "compiler": f"TensorRT-RTX {compiled[0].compiler}",
            "note": UNTRIED,
            "model": manifest.model_name,
            "precision": manifest.precision,
            "activations": manifest.activations,
            "graph": manifest.decode_graph,
            "sha256": {name: manifest.files[name].sha256 for name in (manifest.decode_graph, manifest.data_file)},
            "spec_digest": manifest.spec_digest,
            "weights_sha256": manifest.weights_sha256,
            "workload": asdict(shapes),
            "profiles": [{"phase": phase, "shapes": ranges} for phase, ranges in profiles.items()],
            "layers": compiled[0].kinds(),
            "warnings": list(compiled[0].warnings),
            "engines": [
                {
                    **{k: v for k, v in asdict(engine).items() if k != "faults"},
                    "file": engine_file(work, engine.sm).name,
                    "ep_context": engine_file(work, engine.sm).with_suffix(".onnx").name,
                    "peak": asdict(peak),
                }
                for made, peak in zip(compiled, peaks, strict=True)
                for engine in made.engines
            ],
        }
        (work / "engine.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(args, document | {"folder": str(out)}, _table(document, compiled[0]), f"{out}: {UNTRIED}")
    return 0


def _table(document: dict[str, Any], compiled: Compiled) -> Table:
    kinds = ("KV_CACHE_UPDATE", "ATTENTION_INPUT", "ROTARY_EMBEDDING", "SOFTMAX")
    layers = ", ".join(f"{compiled.kinds().get(kind, 0)} {kind}" for kind in kinds)
    title = f"{document['model']} {document['precision']}, {document['compiler']}: {layers}"
    table = Table("SM", "file", "MB", "seconds", "memory, GB", title=title, title_justify="left")
    for e in document["engines"]:
        memory = f"{e['peak']['own_bytes'] / 1e9:.1f}"
        table.add_row(str(e["sm"]), e["file"], f"{e['nbytes'] / 1e6:,.0f}", f"{e['seconds']:.1f}", memory)
    return table
