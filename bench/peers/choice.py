"""Which peers can take part, and why the others cannot; nothing heavy is imported to find out."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.deployment import Deployment
from bench.peers.genai import LABEL as GENAI
from bench.peers.genai import GenaiSide, genai_python
from bench.peers.llama_cpp import LABEL as LLAMA_CPP
from bench.peers.llama_cpp import LlamaCppSide
from runtime.session import Session, SessionInfo

COMPILE = "pytorch-compile"
TITLES = {
    COMPILE: "PyTorch, torch.compile, static cache",
    GENAI: "onnxruntime-genai's generator, our folder",
    LLAMA_CPP: "llama.cpp",
}


@dataclass(frozen=True)
class Peers:
    """Labels that take part, and a sentence for each that does not."""

    labels: tuple[str, ...]
    skipped: dict[str, str]


def choose(device: str, attention: str, gguf: Path | None) -> Peers:
    """``device`` is the baseline's, ``attention`` the manifest's, ``gguf`` a file for llama.cpp."""
    skipped: dict[str, str] = {}
    if device == "cpu" and not shutil.which("g++") and not shutil.which("clang++"):
        skipped[COMPILE] = "torch.compile needs a C++ compiler (apt-get install g++)"
    if device != "cpu":
        skipped[GENAI] = "onnxruntime-genai runs on the CPU here; its CUDA build is another package"
    elif attention != "GroupQueryAttention":
        skipped[GENAI] = f"onnxruntime-genai does not drive a graph with {attention} attention"
    elif genai_python() is None:
        skipped[GENAI] = "no interpreter with onnxruntime-genai: run scripts/peers"
    if importlib.util.find_spec("llama_cpp") is None:
        skipped[LLAMA_CPP] = "llama-cpp-python is not installed (pip install llama-cpp-python; it compiles)"
    elif gguf is None:
        skipped[LLAMA_CPP] = "no GGUF file was named (--gguf FILE)"
    return Peers(tuple(label for label in TITLES if label not in skipped), skipped)


def opener(
    label: str, model: tuple[Path, Path, str], where: Deployment, gguf: Path | None, info: Callable[[], SessionInfo]
) -> Callable[[], Session]:
    """How to open a peer; ``model`` is checkpoint, exported folder and precision, ``info`` the candidate's."""
    checkpoint, folder, precision = model
    if label == COMPILE:
        from bench.peers.torch_compile import CompiledSession

        return lambda: CompiledSession(checkpoint, precision, where.device, where.threads)
    if label == GENAI:
        python = genai_python()
        assert python is not None
        return lambda: GenaiSide(python, folder, where.threads, info())
    assert gguf is not None
    return lambda: LlamaCppSide(gguf, where.threads)
