"""The PyTorch baseline behind the same protocol: the unpatched transformers model, eager, with its DynamicCache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from export.sizes import context_length
from export.spelling import cache_keyword, without_bars
from runtime.errors import SessionError
from runtime.session import Ids, Logits, SessionInfo, check_prompts, check_rows, check_step, left_pad
from runtime.settings import usable_cores
from runtime.turns import CLOSED, Guarded, guarded

TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchSession(Guarded):
    """A checkpoint folder on PyTorch; see :class:`runtime.session.Session`.

    Args:
        folder: config.json and safetensors.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
        attention: transformers' attention implementation, ``sdpa`` (its default) or ``eager``.
        threads: PyTorch's intra-op threads (a setting of the whole process); None takes every core.
    """

    def __init__(
        self,
        folder: Path,
        precision: str = "fp32",
        device: str = "cpu",
        attention: str = "sdpa",
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._threads = threads or usable_cores()
        torch.set_num_threads(self._threads)
        self._precision, self._device, self._attention = precision, device, attention
        started = time.perf_counter()
        self._model: Any = self._open(folder, TORCH_DTYPE[precision])
        self._model = self._model.to(device).eval()
        # Bloom gives the logits of every position, and refuses to be asked for fewer.
        self._cache_keyword = cache_keyword(self._model.forward)
        self._selects = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.load_s = time.perf_counter() - started
        config = self._model.config
        self._info = SessionInfo(
            runtime="pytorch",
            provider=device,
            precision=precision,
            context_length=context_length(config),
            vocab_size=config.vocab_size,
            details={
                "torch": torch.__version__,
                "attention": self._attention,
                "intra_op_threads": self._threads,
                "kv_cache": "DynamicCache",
            },
        )
        self._drop()

    def _open(self, folder: Path, dtype: torch.dtype) -> Any:
        def load(attention: str) -> Any:
            with without_bars():
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    folder,
                    output_loading_info=True,
                    dtype=dtype,
                    attn_implementation=attention,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
            if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
                raise SessionError(
                    f"{folder} lacks {len(missing)} of the model's tensors, the first {missing[0]}; is it whole?"
                )
            return model

        try:
            return load(self._attention)
        except ValueError as e:
            if self._attention != "sdpa" or "scaled_dot_product_attention" not in str(e):
                raise
            self._attention = "eager"  # GPT-Neo has no other; the record shows it
            return load("eager")

    def _drop(self) -> None:
        self._past: Any = None
        self._batch = 0
        self._used = self._end = 0

    def _free(self) -> None:
        self._model = None

    @property
    def info(self) -> SessionInfo:
        """What runs."""
        return self._info

    @property
    def model(self) -> Any:
        """The transformers model itself, for those who look inside it (the gate's localisation)."""
        if self._closed:
            raise SessionError(CLOSED)
        return self._model

    def _forward(self, **inputs: Any) -> Any:
        with torch.inference_mode():
            return self._model(**inputs, **{self._cache_keyword: self._past}, use_cache=self._past is not None)

    @guarded
    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start a batch; see :meth:`runtime.session.Session.prefill`."""
        lengths = check_prompts(ids, reserve, self._info)
        self._drop()
        padded, mask = left_pad(ids)
        self._past = DynamicCache(config=self._model.config)
        self._even = min(lengths) == max(lengths)
        self._mask = torch.from_numpy(mask).to(self._device)
        self._lengths = torch.tensor(lengths, device=self._device)
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(padded).to(self._device)}
        if not self._even:
            positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
            inputs |= {"attention_mask": self._mask, "position_ids": positions}
        # Only the last position goes through the head, as in transformers' own generate().
        logits = self._forward(**inputs, **({"logits_to_keep": 1} if self._selects else {})).logits[:, -1]
        self._batch = len(ids)
        self._used, self._end = max(lengths), max(lengths) + reserve
        return _fp32(logits)

    @guarded
    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token per row; see :meth:`runtime.session.Session.step`."""
        check_step(ids, self._batch, self._used, self._end)
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self._device)[:, None]}
        if not self._even:
            self._mask = torch.cat([self._mask, self._mask.new_ones((self._batch, 1))], dim=1)
            inputs |= {"attention_mask": self._mask, "position_ids": self._lengths[:, None]}
        logits = self._forward(**inputs).logits[:, -1]
        self._lengths = self._lengths + 1
        self._used += 1
        return _fp32(logits)

    @guarded
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; see :meth:`runtime.ort_session.OrtSession.keep`."""
        check_rows(rows, self._batch)
        index = torch.tensor(rows, device=self._device)
        self._past.batch_select_indices(index)
        self._mask, self._lengths, self._batch = self._mask[index], self._lengths[index], len(rows)

    @guarded
    def score(self, ids: Sequence[int], places: Sequence[int] | None = None) -> Logits:
        """Logits of one sequence at some positions, None for all: ``[positions, vocab]``.

        The whole text is computed, but only these positions go through the head and into memory.
        """
        check_prompts([ids], 0, self._info)
        self._drop()
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=self._device)}
        if places is None:
            return _fp32(self._forward(**inputs).logits[0])
        kept = torch.tensor(list(places), device=self._device)
        if not self._selects:
            return _fp32(self._forward(**inputs).logits[0][kept])
        return _fp32(self._forward(**inputs, logits_to_keep=kept).logits[0])


def _fp32(logits: torch.Tensor) -> Logits:
    out: Logits = logits.to(device="cpu", dtype=torch.float32).numpy().astype(np.float32, copy=False)
    return out
