"""optimum's ``ORTModelForCausalLM`` on its own plain export: what most teams run today.

The plain graph is exported once into the cache, in a process of its own (it peaks at several times the weights).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.process.child import output_of
from export.cache import publish
from export.sizes import context_length
from runtime.errors import SessionError
from runtime.session import Ids, Logits, SessionInfo, check_prompts, check_step, right_pad
from runtime.settings import usable_cores

LABEL = "optimum-ort"


def plain_export(checkpoint: Path, target: Path) -> Path:
    """optimum's own ONNX export of ``checkpoint`` at ``target``, made when missing.

    Raises:
        MissingOptimumError: there is no optimum here.
        BenchError: optimum failed; its last line is quoted.
    """
    if (target / "model.onnx").is_file():
        return target
    from export.optimum_adapter import require_optimum  # transformers

    require_optimum("optimum's plain export")
    with publish(target, shared=True) as work:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", str(checkpoint)]
        command += ["--task", "text-generation-with-past", "--no-post-process", str(work)]
        failed = f"optimum's plain export of {checkpoint} failed: "
        output_of(command, failed)
        if not (work / "model.onnx").is_file():
            raise BenchError(f"{failed}it wrote no model.onnx")
    return target


class OptimumSession:
    """optimum's model behind the session protocol; single-row or even batches.

    Args:
        folder: optimum's plain export.
        threads: intra-op threads; None takes every core.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime as ort

        try:
            from optimum.onnxruntime import ORTModelForCausalLM
        except ImportError:
            from export.optimum_adapter import require_optimum

            require_optimum("ORTModelForCausalLM")
            raise

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        self._model: Any = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
        self._past: Any = None
        self._batch = self._used = self._end = 0
        config = self._model.config
        self.info = SessionInfo(
            runtime="optimum",
            provider="ort",
            precision="fp32",
            context_length=context_length(config),
            vocab_size=config.vocab_size,
            details={"graph": "optimum's plain export", "intra_op_threads": options.intra_op_num_threads},
        )

    def _forward(self, ids: Any, mask: Any) -> Logits:
        import torch

        with torch.inference_mode():
            out = self._model(input_ids=ids, attention_mask=mask, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        logits: Logits = out.logits[:, -1].float().numpy().astype(np.float32, copy=False)
        return logits

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start an even batch; see :meth:`runtime.session.Session.prefill`."""
        import torch

        lengths = check_prompts(ids, reserve, self.info)
        if min(lengths) != max(lengths):
            raise SessionError("this peer is measured on even batches only")
        padded, mask = right_pad(ids)
        self._past, self._mask = None, torch.from_numpy(mask)
        self._batch, self._used, self._end = len(ids), max(lengths), max(lengths) + reserve
        return self._forward(torch.from_numpy(padded), self._mask)

    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token per row; see :meth:`runtime.session.Session.step`."""
        import torch

        check_step(ids, self._batch, self._used, self._end)
        self._mask = torch.cat([self._mask, self._mask.new_ones((self._batch, 1))], dim=1)
        self._used += 1
        return self._forward(torch.tensor(ids)[:, None], self._mask)

    def score(self, ids: Sequence[int]) -> Logits:
        """Not measured for peers."""
        raise SessionError("this peer is measured for latency only")

    def close(self) -> None:
        """Free the model; closing twice is allowed."""
        self._model = self._past = None
        self._batch = 0
