"""An exported folder on ONNX Runtime.

What a decode step does: write one id per row, extend the mask, run the bound graph. Everything else (KV buffers, id
and logits buffers) is bound once per batch. Try: ``llama-onnx generate FOLDER "The capital of France is"``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import Manifest
from runtime.errors import SessionError
from runtime.huge_pages import collapse
from runtime.kv_cache import GrowingCache, SharedCache
from runtime.providers import Provider, provider_list, require, require_active
from runtime.session import Ids, Logits, SessionInfo, check_prompts, check_step, right_pad

_HUGE_PAGES_FROM = 64 << 20


class OrtSession:
    """One exported folder, ready to run; see :class:`runtime.session.Session`.

    Args:
        folder: the exported folder, verified by the caller (:func:`runtime.load`).
        manifest: its manifest.
        provider: ``cpu``, ``cuda``, ...
        threads: intra-op threads on the CPU; None takes every core this process may use.
        huge_pages: on the CPU, move the packed weights into 2 MiB pages (:mod:`runtime.huge_pages`); opening takes
            longer by about 2.5 s per GB, each decode step is shorter.
        options: session configuration entries by their name in ONNX Runtime.

    Raises:
        ProviderUnavailableError: the provider is not installed, did not load, or lacks an operator.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: str = "cpu",
        threads: int | None = None,
        huge_pages: bool = True,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._provider: Provider = require(provider, manifest)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._options = dict(options or {})
        started = time.perf_counter()
        self._decode = self._open(manifest.decode_graph)
        self._huge_bytes = 0
        if huge_pages and self._provider.device == "cpu" and manifest.decode_weight_bytes > _HUGE_PAGES_FROM:
            self._huge_bytes = collapse()
        self.load_s = time.perf_counter() - started
        self._scoring: Any = None
        kinds = {o.name: o.type for o in self._decode.get_outputs()}
        self._logits_dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[kinds["logits"]]
        self._cache: SharedCache | GrowingCache | None = None
        self._closed = False
        self._reset()

    def _open(self, graph: str) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for key, value in self._options.items():
            options.add_session_config_entry(key, value)
        try:
            session = ort.InferenceSession(
                str(self.folder / graph), sess_options=options, providers=provider_list(self._provider)
            )
        except Exception as e:  # onnxruntime raises its own C++-bound classes
            first = str(e).splitlines()[0][:300]
            raise SessionError(f"onnxruntime {ort.__version__} cannot open {self.folder / graph}: {first}") from None
        session.disable_fallback()
        require_active(session, self._provider)
        return session

    @property
    def info(self) -> SessionInfo:
        """What runs."""
        return SessionInfo(
            runtime="onnxruntime",
            provider=self._provider.name,
            precision=self.manifest.precision,
            context_length=self.manifest.context_length,
            vocab_size=self.manifest.vocab_size,
            details={
                "onnxruntime": ort.__version__,
                "execution_provider": self._provider.ort_name,
                "intra_op_threads": self._threads,
                "graph_optimization": "all",
                "huge_pages_mb": self._huge_bytes >> 20,
                **{f"option {key}": value for key, value in self._options.items()},
                "attention": self.manifest.attention,
                "kv_cache": (
                    "preallocated, past and present share memory"
                    if self.manifest.kv.shared_buffer
                    else "joined by Concat in each step"
                ),
            },
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV buffers that are allocated now."""
        return self._cache.nbytes if self._cache else 0

    def _reset(self) -> None:
        self._batch = 0
        self._lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._end = 0

    def _require_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; open a new one")

    def _bound(self, buffers: dict[str, NDArray[Any]], cache: SharedCache | GrowingCache, session: Any) -> Any:
        """A binding with the KV cache and host inputs bound; logits follow in :meth:`_bind_logits`."""
        binding = session.io_binding()
        cache.bind(binding)
        for name, array in buffers.items():
            if name in self.manifest.inputs:
                self._bind_input(binding, name, array)
        return binding

    @staticmethod
    def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
        """Bind host memory by address: no copy, but ``array`` must stay alive while the binding is used."""
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_logits(self, binding: Any, positions: int, rows: int) -> NDArray[Any]:
        """Host memory for the logits; the provider copies them there (the CPU writes in place)."""
        logits = np.empty((rows, positions, self.manifest.vocab_size), self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        return logits

    def _new_cache(self, batch: int, tokens: int) -> SharedCache | GrowingCache:
        if self.manifest.kv.shared_buffer:
            return SharedCache(self.manifest.kv, batch, tokens, self.manifest.context_length, self._provider.device)
        return GrowingCache(self.manifest.kv, batch, self._provider.device)

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start a batch; see :meth:`runtime.session.Session.prefill`."""
        self._require_open()
        lengths = check_prompts(ids, reserve, self.info)
        self._reset()
        tokens = max(lengths) + reserve
        if not (isinstance(self._cache, SharedCache) and self._cache.holds(len(ids), tokens)):
            self._cache = None  # freed before the next one is allocated
            self._cache = self._new_cache(len(ids), tokens)
        padded, mask = right_pad(ids)
        positions = _positions(mask)
        buffers = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
        binding = self._bound(buffers, self._cache, self._decode)
        last_only = self.manifest.decode_logits == "last"
        logits = self._bind_logits(binding, 1 if last_only else padded.shape[1], len(ids))
        self._decode.run_with_iobinding(binding)
        self._cache.taken(binding)

        self._batch = len(ids)
        self._lengths = np.asarray(lengths, np.int64)
        self._end = tokens
        self._ids = np.zeros((self._batch, 1), np.int64)
        if self.manifest.kv.shared_buffer:
            self._mask = np.ones(self._batch * tokens, np.int64)
            self._step_binding = self._bound({"input_ids": self._ids}, self._cache, self._decode)
            self._step_logits = self._bind_logits(self._step_binding, 1, self._batch)
        else:
            # New tokens stand behind each row's padding in the cache; the mask keeps it out.
            self._mask = np.ones((self._batch, tokens), np.int64)
            self._mask[:, : mask.shape[1]] = mask
            self._width = mask.shape[1]
        return _fp32(logits[:, 0] if last_only else logits[np.arange(len(ids)), self._lengths - 1])

    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token per row; see :meth:`runtime.session.Session.step`."""
        self._require_open()
        longest = int(self._lengths.max()) if self._batch else 0
        check_step(ids, self._batch, longest, self._end)
        self._ids[:, 0] = ids
        self._lengths += 1
        if not self.manifest.kv.shared_buffer:
            return self._growing_step()
        total = longest + 1
        # The graph reads the mask's row sums (lengths) and its width (the longest row), nothing else.
        mask = self._mask[: self._batch * total].reshape(self._batch, total)
        if self._batch > 1:  # a single row is all ones
            np.less(np.arange(total), self._lengths[:, None], out=mask, casting="unsafe")
        self._bind_input(self._step_binding, "attention_mask", mask)
        if "position_ids" in self.manifest.inputs:
            self._position = self._lengths[:, None] - 1
            self._bind_input(self._step_binding, "position_ids", self._position)
        self._decode.run_with_iobinding(self._step_binding)
        return _fp32(self._step_logits[:, 0])

    def _growing_step(self) -> Logits:
        assert self._cache is not None
        self._width += 1
        mask = np.ascontiguousarray(self._mask[:, : self._width])
        positions = self._lengths[:, None] - 1
        buffers = {"input_ids": self._ids, "attention_mask": mask, "position_ids": positions}
        binding = self._bound(buffers, self._cache, self._decode)
        logits = self._bind_logits(binding, 1, self._batch)
        self._decode.run_with_iobinding(binding)
        self._cache.taken(binding)
        return _fp32(logits[:, 0])

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits at all positions, from the scoring graph (opened on first use)."""
        self._require_open()
        check_prompts([ids], 0, self.info)
        if self._scoring is None:
            same = self.manifest.scoring_graph == self.manifest.decode_graph
            self._scoring = self._decode if same else self._open(self.manifest.scoring_graph)
        self._reset()
        self._cache = None
        cache = self._new_cache(1, len(ids))
        padded, mask = right_pad([ids])
        positions = _positions(mask)
        buffers = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
        binding = self._bound(buffers, cache, self._scoring)
        logits = self._bind_logits(binding, len(ids), 1)
        self._scoring.run_with_iobinding(binding)
        return _fp32(logits[0])

    def close(self) -> None:
        """Free everything; closing twice is allowed."""
        self._closed = True
        self._reset()
        self._cache = self._decode = self._scoring = self._step_binding = None

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among its row's valid ones, ``[batch, width]``; padding gets the last one again."""
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return positions


def _fp32(logits: NDArray[Any]) -> Logits:
    return logits.astype(np.float32, copy=False)
