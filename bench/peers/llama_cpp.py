"""llama.cpp through llama-cpp-python, on a GGUF file: an optional peer, it compiles for about ten minutes.

Its Q4_1 weights are other numbers than ours: its parity line says how far its tokens agree, nothing more is claimed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.peers.own_loop import OwnLoop
from runtime.errors import SessionError
from runtime.generate import LENGTH, Generation
from runtime.session import Ids, SessionInfo

LABEL = "llama.cpp"


class LlamaCppSide(OwnLoop):
    """One row at a time behind :meth:`own_generate`.

    Args:
        gguf: the model file.
        threads: for prompt and decode alike.
    """

    def __init__(self, gguf: Path, threads: int, context: int = 2048) -> None:
        import llama_cpp

        self._model: Any = llama_cpp.Llama(
            str(gguf), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        details: dict[str, str | int | float | bool] = {
            "llama_cpp_python": llama_cpp.__version__,
            "file": gguf.name,
            "intra_op_threads": threads,
        }
        self.info = SessionInfo("llama.cpp", "cpu", gguf.stem, context, self._model.n_vocab(), details)

    def own_generate(self, prompts: Ids, new_tokens: int) -> Generation:
        """Greedy tokens of one row, end tokens not taken.

        Raises:
            SessionError: more than one row.
        """
        if len(prompts) != 1:
            raise SessionError("llama.cpp is measured at batch 1 only")
        started = time.perf_counter()
        tokens: list[int] = []
        at = []
        for token in self._model.generate(list(prompts[0]), temp=0.0, reset=True):
            tokens.append(int(token))
            at.append(time.perf_counter() - started)
            if len(tokens) == new_tokens:
                break
        return Generation((tuple(tokens),), tuple(at), (False,), (LENGTH,))

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self._model = None
