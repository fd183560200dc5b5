"""A child process that compiles a graph with TensorRT-RTX: its memory is known alone, and its crash is an outcome.

Try: ``python -m pytest tests/bench/process/test_trt_compile.py``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.errors import MachineError, run_child
from bench.process import child
from bench.process.peak import peak_bytes
from runtime.errors import CompileError, CompilerMissingError, SessionError
from runtime.trt_compiler import Compiled, Engine, Fault, Layer, Ranges, compile_graph

WATCH_S = 0.05


@dataclass(frozen=True)
class Peak:
    """Peak resident bytes of the child, and those of them that are its own: files that it maps can be evicted."""

    resident_bytes: int
    own_bytes: int


def compile_in_child(
    graph: Path, profiles: Sequence[Ranges] = (), sms: Sequence[int] = (), out: Path | None = None
) -> tuple[Compiled, Peak]:
    """:func:`runtime.trt_compiler.compile_graph` in a process of its own.

    Raises:
        CompilerMissingError: the compiler is not installed.
        MachineError: not enough memory.
        CompileError: the child died; a graph that is refused is no error but :attr:`Compiled.faults`.
    """
    asked = {"graph": str(graph), "profiles": profiles, "sms": sms, "out": None if out is None else str(out)}
    ended = child.run_child([sys.executable, "-m", __name__, json.dumps(asked)], dict(os.environ), math.inf)
    if ended.refusal:
        missing = ended.exit_code == CompilerMissingError.exit_code
        raise (CompilerMissingError if missing else SessionError)(ended.refusal)
    if ended.outcome == "oom":
        raise MachineError(
            f"TensorRT-RTX's compiler ran out of memory over {graph.name}; it needs twice the weights: take a "
            f"machine with more, or a smaller precision"
        )
    if ended.outcome != "ok":
        said = f" ({ended.last_lines[-1]})" if ended.last_lines else ""
        raise CompileError(f"TensorRT-RTX's compiler died over {graph.name}: {ended.reason}{said}")
    return _read(ended.found["compiled"]), Peak(**ended.found["peak"])


def _read(raw: dict[str, Any]) -> Compiled:
    faults = tuple(Fault(**f) for f in raw["faults"])
    layers = tuple(Layer(e["kind"], e["name"], tuple(e["inputs"]), tuple(e["outputs"])) for e in raw["layers"])
    engines = tuple(Engine(**e | {"faults": tuple(Fault(**f) for f in e["faults"])}) for e in raw["engines"])
    return Compiled(raw["compiler"], faults, layers, tuple(raw["warnings"]), engines)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """The child's body."""
    own, ended = [0], threading.Event()

    def watch() -> None:
        import psutil

        me = psutil.Process()
        while not ended.wait(WATCH_S):
            memory = me.memory_info()
            own[0] = max(own[0], memory.rss - getattr(memory, "shared", 0))

    threading.Thread(target=watch, daemon=True).start()
    out = None if asked["out"] is None else Path(asked["out"])
    compiled = compile_graph(Path(asked["graph"]), asked["profiles"], asked["sms"], out)
    ended.set()
    return {"compiled": asdict(compiled), "peak": {"resident_bytes": peak_bytes(), "own_bytes": own[0]}}


if __name__ == "__main__":
    sys.exit(run_child(lambda: print(json.dumps(main(json.loads(sys.argv[1]))))))
