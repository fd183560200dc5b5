"""PyTorch with ``torch.compile`` and a static KV cache: the fastest that transformers itself offers.

Only the decode step is compiled (its shapes never change); the prompt runs eagerly, as in the baseline. Needs a C++
compiler on the CPU. Try: ``pytest bench/ --peers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.errors import BenchError
from export.manifest import first_line
from runtime.errors import SessionError
from runtime.session import Ids, Logits, check_prompts, check_step
from runtime.torch_session import TorchSession
from runtime.turns import guarded


class CompiledSession(TorchSession):
    """Even batches behind the session protocol; arguments are :class:`runtime.torch_session.TorchSession`'s.

    Raises:
        BenchError: compiling failed (first step); the compiler's first line is quoted.
    """

    _static: Any = None
    _decode: Any = None
    _static_batch: int = 0
    _static_size: int = 0

    def __init__(self, folder: Path, precision: str = "fp32", device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(folder, precision, device, threads=threads)
        self._info.details.update(kv_cache="StaticCache", compiled="the decode step")

    @guarded
    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start an even batch; see :meth:`runtime.session.Session.prefill`."""
        from transformers import StaticCache

        lengths = check_prompts(ids, reserve, self._info)
        if min(lengths) != max(lengths):
            raise SessionError("this peer is measured on even batches only")
        self._drop()
        size = -(-(lengths[0] + reserve) // 64) * 64  # a new size compiles anew
        if self._static is None or (self._static_batch, self._static_size) != (len(ids), size):
            self._static = StaticCache(config=self._model.config, max_cache_len=size)
            self._static_batch, self._static_size = len(ids), size
        with torch.inference_mode():  # its tensors were made there
            self._static.reset()
        places = torch.arange(lengths[0], device=self._device)
        self._batch, self._used, self._end = len(ids), lengths[0], lengths[0] + reserve
        return self._run(self._model, torch.tensor(ids, device=self._device), places, logits_to_keep=1)

    @guarded
    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token per row; the first call compiles."""
        check_step(ids, self._batch, self._used, self._end)
        if self._decode is None:
            mode = "reduce-overhead" if self._device == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # importing inductor uses what torch deprecates
                self._decode = torch.compile(self._model, mode=mode, dynamic=False)
        places = torch.tensor([self._used], device=self._device)
        self._used += 1
        try:
            return self._run(self._decode, torch.tensor(ids, device=self._device)[:, None], places)
        except torch._dynamo.exc.TorchDynamoException as e:
            raise BenchError(f"torch.compile failed: {first_line(e)}; run without --peers") from None

    def _run(self, model: Any, ids: torch.Tensor, places: torch.Tensor, **more: Any) -> Logits:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's own notes
            out = model(
                input_ids=ids,
                cache_position=places,
                position_ids=places[None].expand(len(ids), -1),
                use_cache=True,
                **{self._cache_keyword: self._static},
                **more,
            )
        logits: Logits = out.logits[:, -1].to("cpu", torch.float32).numpy().astype(np.float32, copy=False)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Not offered: a static batch is what this peer is about."""
        raise SessionError("a compiled batch cannot shrink; run without end tokens")

    def _free(self) -> None:
        self._static = self._decode = None
        super()._free()
