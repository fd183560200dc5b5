"""onnxruntime-genai's generator as a side of the benchmark: same folder, same prompts, same threads, own process.

It runs our exported folder (``genai_config.json`` lies in it), so what is compared is the loop, not the graph; another
folder of its own builder's can be named. Its time stamps are taken in its process: pipes cost it nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.peers.own_loop import OwnLoop
from bench.process.child import TIED, Child
from runtime.errors import SessionError
from runtime.generate import LENGTH, Generation
from runtime.session import Ids, SessionInfo

LABEL = "onnxruntime-genai"
PYTHON = "LLAMA_ONNX_GENAI_PYTHON"
"""Environment variable: the interpreter that has onnxruntime-genai."""
ENVIRONMENT = Path(".venv-genai")
"""Made by ``scripts/peers``."""


def genai_python() -> Path | None:
    """The interpreter with onnxruntime-genai: named by the environment, made by ``scripts/peers``, or this one."""
    import importlib.util

    named = os.environ.get(PYTHON)
    if named:
        return Path(named)
    made = Path(__file__).parent.parent.parent / ENVIRONMENT / "bin" / "python"
    if made.is_file():
        return made
    return Path(sys.executable) if importlib.util.find_spec("onnxruntime_genai") else None


class GenaiSide(OwnLoop):
    """A child process that generates on request.

    Between requests it is stopped where that can be done: threads that spin on would slow whoever is measured next.

    Raises:
        BenchError: the child does not start; its last line is quoted.
    """

    def __init__(self, python: Path, folder: Path, threads: int, info: SessionInfo) -> None:
        server = [str(python), str(Path(__file__).with_name("genai_server.py")), str(folder), str(threads)]
        command = [str(python), str(TIED), *server]  # stopped between its turns, it would outlive a killed parent
        self._child: Child | None = Child(command, os.environ, math.inf, talks=True)
        version = self._answer(self._child)["version"]
        details: dict[str, str | int | float | bool] = {
            "onnxruntime_genai": version,
            "intra_op_threads": threads,
            "graph": "the exported folder, its own generator",
        }
        self.info = SessionInfo(
            "onnxruntime-genai", "cpu", info.precision, info.context_length, info.vocab_size, details
        )

    def _answer(self, child: Child) -> dict[str, Any]:
        """Its next line of JSON; it rests after that."""
        line = child.hear("{")
        if line is None:
            self._child = None
            last = (child.ended().last_lines or ["no output"])[-1]
            raise BenchError(f"onnxruntime-genai's process ended: {last[:200]}; run scripts/peers, or without --peers")
        child.pause()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def own_generate(self, prompts: Ids, new_tokens: int) -> Generation:
        """Greedy, ``new_tokens`` for each row, end tokens not taken."""
        if self._child is None:
            raise SessionError("the session is closed; open a new one")
        self._child.wake()
        self._child.say(json.dumps({"prompts": [list(p) for p in prompts], "new_tokens": new_tokens}))
        found = self._answer(self._child)
        rows = tuple(tuple(row) for row in found["tokens"])
        return Generation(rows, tuple(found["at_s"]), (False,) * len(rows), (LENGTH,) * len(rows))

    def close(self) -> None:
        """End the child; closing twice is allowed."""
        if self._child is not None:
            self._child.close()
        self._child = None
