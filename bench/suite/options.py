"""The suite's own options: what :class:`bench.suite.run.Run` is made of, once they are parsed.

Try: ``pytest bench/ --help``, under llama-onnx-bench.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import deployment
from bench.latency.workload import PROFILES
from export.source import add_option


def numbers(text: str) -> tuple[int, ...]:
    """``1,4,8`` as numbers; ValueError for anything else, which argparse and pytest turn into a message."""
    return tuple(int(part) for part in text.split(",") if part.strip())


def add_options(add: Callable[..., Any]) -> None:
    """Define them; ``add`` is pytest's ``addoption`` or argparse's ``add_argument``."""
    add("--model", default="demo", help="'demo', a checkpoint folder, a .gguf file or a hub id")
    add_option(add)
    add("--exported", type=Path, help="test this exported folder against --model; other options say what it has to be")
    add("--precision", default="auto", help="fp32, fp16, bf16, int8, int4 or auto (fp32 on the CPU, fp16 on a GPU)")
    add("--target", default="auto", help="ort, tensorrt, plain or auto (ort for what has a fused export, else plain)")
    add("--method", help="int8 and int4: rtn, hqq, kquant or gptq")
    deployment.add_options(add, "auto")
    add("--profile", default="standard", choices=sorted(PROFILES), help="how much is measured, by gate and latency")
    add("--batch-sizes", type=numbers, default=(), help="for example 1,4")
    add("--prompt-lengths", type=numbers, default=(), help="in tokens, for example 128,1024")
    add("--new-tokens", type=int, help="tokens generated in each latency round")
    add("--dataset", help="JSONL file (bench/data/README.md) or hf:NAME[:CONFIG][@SPLIT]; own+FILE adds to ours")
    add("--workers", type=int, default=1, help="processes that share the gate's chunks and generations (Ray)")
    add("--peers", action="store_true", help="torch.compile, onnxruntime-genai and llama.cpp beside it")
    add("--gguf", type=Path, help="the file that llama.cpp runs with --peers")
    add("--wait", dest="lock_wait", type=float, default=0.0, help="seconds to wait for another measurement")
    add("--report-dir", type=Path, default=Path("reports/out"), help="where the page is written")
