"""onnxruntime-genai's generator as a side of the benchmark: same folder, same prompts, same threads, own process.

It runs our exported folder (``genai_config.json`` lies in it), so what is compared is the loop, not the graph; another
folder of its own builder's can be named. Its time stamps are taken in its process: pipes cost it nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.process.child import TIED, can_take_turns
from runtime.errors import SessionError
from runtime.generate import LENGTH, Generation
from runtime.session import Ids, Logits, SessionInfo

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


class GenaiSide:
    """A child process that generates on request; has no logits, so only :meth:`own_generate` works.

    Between requests it is stopped where that can be done: threads that spin on would slow whoever is measured next.

    Raises:
        BenchError: the child does not start; its last line is quoted.
    """

    def __init__(self, python: Path, folder: Path, threads: int, info: SessionInfo) -> None:
        server = [str(python), str(Path(__file__).with_name("genai_server.py")), str(folder), str(threads)]
        command = [str(python), str(TIED), *server]  # stopped between its turns, it would outlive a killed parent
        self._child: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        version = self._answer()["version"]
        details: dict[str, str | int | float | bool] = {
            "onnxruntime_genai": version,
            "intra_op_threads": threads,
            "graph": "the exported folder, its own generator",
        }
        self._rest()
        self._info = SessionInfo(
            "onnxruntime-genai", "cpu", info.precision, info.context_length, info.vocab_size, details
        )

    @property
    def info(self) -> SessionInfo:
        """What runs."""
        return self._info

    def _rest(self) -> None:
        if can_take_turns():
            self._child.send_signal(signal.SIGSTOP)

    def _wake(self) -> None:
        if can_take_turns():
            self._child.send_signal(signal.SIGCONT)

    def _answer(self) -> dict[str, Any]:
        line = self._child.stdout.readline()
        if not line:
            _, said = self._child.communicate()
            last = (said.strip().splitlines() or ["no output"])[-1]
            raise BenchError(f"onnxruntime-genai's process ended: {last[:200]}; run scripts/peers, or without --peers")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def own_generate(self, prompts: Ids, new_tokens: int) -> Generation:
        """Greedy, ``new_tokens`` for each row, end tokens not taken."""
        if self._child is None:
            raise SessionError("the session is closed; open a new one")
        self._wake()
        self._child.stdin.write(json.dumps({"prompts": [list(p) for p in prompts], "new_tokens": new_tokens}) + "\n")
        self._child.stdin.flush()
        found = self._answer()
        self._rest()
        rows = tuple(tuple(row) for row in found["tokens"])
        return Generation(rows, tuple(found["at_s"]), (False,) * len(rows), (LENGTH,) * len(rows))

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Not offered."""
        raise SessionError("this peer shows no logits")

    def step(self, ids: Sequence[int]) -> Logits:
        """Not offered."""
        raise SessionError("this peer shows no logits")

    def score(self, ids: Sequence[int]) -> Logits:
        """Not offered."""
        raise SessionError("this peer shows no logits")

    def close(self) -> None:
        """End the child; closing twice is allowed."""
        if self._child is not None:
            self._wake()
            self._child.stdin.close()
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child.stdout.close()
            self._child.stderr.close()
        self._child = None
