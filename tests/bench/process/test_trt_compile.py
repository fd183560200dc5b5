"""Compiling in a child: the same answer, its memory, and a crash that is an outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import MachineError
from bench.process import trt_compile
from bench.process.child import Ended
from bench.process.trt_compile import compile_in_child
from export.manifest import DECODE_GRAPH
from runtime.errors import CompileError, CompilerMissingError
from runtime.loading import read_folder
from runtime.tensorrt import Shapes, engine_profiles
from runtime.trt_compiler import compile_graph


@pytest.mark.usefixtures("tensorrt_rtx")
def test_the_same_as_in_this_process(exports: Callable[..., Path]) -> None:
    folder = exports("fp16", {"target": "tensorrt"}, head_dim=64)
    profiles = list(
        engine_profiles(read_folder(folder, verify=False), Shapes(new_tokens=20, prompt=(1, 16, 40))).values()
    )
    here = compile_graph(folder / DECODE_GRAPH, profiles, (89,))
    there, peak = compile_in_child(folder / DECODE_GRAPH, profiles, (89,))
    (engine,) = there.engines
    assert engine.seconds > 0
    assert replace(there, engines=()) == replace(here, engines=())
    assert engine.nbytes == here.engines[0].nbytes  # its bytes differ from run to run
    assert 30e6 < peak.own_bytes < peak.resident_bytes < 2e9


@pytest.mark.parametrize(
    ("ended", "error", "said"),
    [
        (
            Ended("crash", "signal 11", -11, ["Myelin fell over"], {}),
            CompileError,
            r"died over m\.onnx: signal 11 \(My",
        ),
        (
            Ended("oom", "out of memory", -9, [], {}),
            MachineError,
            r"out of memory over m\.onnx; it needs twice the weights",
        ),
        (Ended("crash", "no", 4, [], {}, refusal="pip install it"), CompilerMissingError, "pip install it"),
    ],
)
def test_how_a_child_may_end(ended: Ended, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_compile.child, "run_child", lambda *_: ended)
    with pytest.raises(error, match=said):
        compile_in_child(Path("m.onnx"))
