"""An exported folder on ONNX Runtime.

What a decode step does: write one id per row, extend the mask, run the bound graph. Everything else (KV buffers, id
and logits buffers) is bound once per batch. Try: ``llama-onnx generate FOLDER "The capital of France is"``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import Manifest
from runtime.device_decode import GRAPH_KEY, NO_GRAPH, DeviceDecoder
from runtime.errors import ProviderUnavailableError, SessionError
from runtime.huge_pages import collapse
from runtime.kv_cache import BFLOAT16, GrowingCache, SharedCache, to_fp32
from runtime.pipeline import PipelineMixin
from runtime.provider_options import DEFAULTS, as_text
from runtime.providers import (
    PROVIDERS,
    Provider,
    attach,
    placement,
    provider_list,
    require,
    require_active,
    require_placed,
    stray_operators,
)
from runtime.session import Ids, Logits, SessionInfo, check_prompts, check_rows, check_step, left_pad, right_pad
from runtime.tensorrt import Shapes, engine_options, gpu_name, profile_options, require_inside

_HUGE_PAGES_FROM = 64 << 20
_ROW_TOKENS = 16
"""Shortest prompt of a CPU batch whose rows are prefilled one by one."""


P = ParamSpec("P")
R = TypeVar("R")


def _all_or_nothing(
    method: Callable[Concatenate[OrtSession, P], R],
) -> Callable[Concatenate[OrtSession, P], R]:
    """What is interrupted (Ctrl-C, out of memory) leaves no batch behind, rather than half a one."""

    @wraps(method)
    def run(self: OrtSession, /, *args: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *args, **options)
        except SessionError:  # refused before anything ran
            raise
        except BaseException:
            self._reset()
            self._cache = self._device = None
            raise

    return run


class OrtSession(PipelineMixin):
    """One exported folder, ready to run; see :class:`runtime.session.Session`.

    Args:
        folder: the exported folder, verified by the caller (:func:`runtime.load`).
        manifest: its manifest.
        provider: ``cpu``, ``cuda``, ...
        threads: intra-op threads on the CPU; None takes every core this process may use.
        huge_pages: on the CPU, move the packed weights into 2 MiB pages (:mod:`runtime.huge_pages`); opening takes
            longer by about 2.5 s per GB, each decode step is shorter.
        provider_options: options of the execution provider by ONNX Runtime's names, over the defaults.
        allow_fallback: a provider that does not load or take every node is a line in ``info.details``, no error.
        cuda_graph: on CUDA, capture a greedy decode step as a CUDA graph.
        argmax_on_device: choose greedy tokens where the logits are; None does so on a GPU.
        shapes: what TensorRT builds its engines for (rows, prompt and new tokens); None for :class:`Shapes`' own.
        engine_home: where engines are kept; None keeps none (each opening builds them again).
        session_options: ONNX Runtime session configuration entries, such as ``session.intra_op.allow_spinning``.

    Raises:
        ProviderUnavailableError: the provider is not installed, did not load, or lacks an operator.
    """

    _mask: NDArray[np.int64]

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: str = "cpu",
        threads: int | None = None,
        huge_pages: bool = True,
        provider_options: Mapping[str, str] | None = None,
        allow_fallback: bool = False,
        cuda_graph: bool = True,
        argmax_on_device: bool | None = None,
        shapes: Shapes | None = None,
        engine_home: Path | None = None,
        session_options: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._allow_fallback, self._fallbacks = allow_fallback, dict[str, str]()
        try:
            self._provider: Provider = require(provider, manifest)
        except ProviderUnavailableError as e:
            if not allow_fallback:
                raise
            self._fall_back(str(e))
        wants_device = self._provider.device == "cuda" if argmax_on_device is None else argmax_on_device
        last_only = manifest.kv.shared_buffer and manifest.decode_logits == "last"
        self.argmax_on_device = wants_device and last_only
        self._cuda_graph = cuda_graph and self._provider.name == "cuda" and self.argmax_on_device
        if self._cuda_graph:
            provider_options = {"enable_cuda_graph": "1", **(provider_options or {})}
        self._options = {} if self._fallbacks else as_text(DEFAULTS[provider], provider_options)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._shapes = (shapes or Shapes()) if self._provider.name.startswith("tensorrt") else None
        self._engine_home, self._build_s = engine_home, 0.0
        self._session_options = dict(session_options or {})
        started = time.perf_counter()
        self._decode = self._open(manifest.decode_graph)
        self._prefill = self._open(manifest.decode_graph, "prefill") if self._shapes else self._decode
        self._huge_bytes = 0
        if huge_pages and self._provider.device == "cpu" and manifest.decode_weight_bytes > _HUGE_PAGES_FROM:
            self._huge_bytes = collapse()
        self.load_s = time.perf_counter() - started - self._build_s
        self._scoring: Any = None
        kinds = {o.name: o.type for o in self._decode.get_outputs()}
        self._run_options: Any = None
        if self._cuda_graph:  # only what DeviceDecoder runs is captured
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry(GRAPH_KEY, NO_GRAPH)
        # None for bfloat16, which numpy lacks
        self._logits_dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(kinds["logits"])
        self._device: DeviceDecoder | None = None
        self._cache: SharedCache | GrowingCache | None = None
        self._closed = False
        self._reset()

    def _open(self, graph: str, phase: str = "decode") -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for key, value in self._session_options.items():
            options.add_session_config_entry(key, value)
        chosen, built = self._engine_options(phase)
        attach(options, self._provider, chosen)
        started = time.perf_counter()
        try:
            session = ort.InferenceSession(
                str(self.folder / graph), sess_options=options, providers=provider_list(self._provider, chosen)
            )
        except Exception as e:  # onnxruntime raises its own C++-bound classes
            first = str(e).splitlines()[0][:300]
            raise SessionError(f"onnxruntime {ort.__version__} cannot open {self.folder / graph}: {first}") from None
        if not built:
            self._build_s += time.perf_counter() - started
        session.disable_fallback()
        self._where = placement(session)
        if line := require_active(session, self._provider, self._allow_fallback):
            self._fall_back(line)
        strays = stray_operators(session, self._provider)
        if line := require_placed(self._where, self._provider, strays, self._allow_fallback):
            self._fallbacks["partly_elsewhere"] = line
        return session

    def _engine_options(self, phase: str) -> tuple[dict[str, str], bool]:
        """The provider's options for one phase, and whether opening is mere loading (True but for TensorRT)."""
        if self._shapes is None:
            return self._options, True
        if self._engine_home is None:
            prefix = "nv" if self._provider.plugin else "trt"
            return profile_options(self.manifest, self._shapes, phase, prefix) | self._options, False
        more, built = engine_options(
            self._provider.name, self.manifest, self._shapes, phase, self._engine_home, gpu_name()
        )
        return self._options | more, built

    def _fall_back(self, why: str) -> None:
        """Go on on the CPU, and say so in the record."""
        self._provider = PROVIDERS["cpu"]
        self._fallbacks["fallback"] = why

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
                "greedy_token": "argmax on the device" if self.argmax_on_device else "argmax on the host",
                **({"cuda_graph": self._cuda_graph} if self._provider.name == "cuda" else {}),
                "huge_pages_mb": self._huge_bytes >> 20,
                **{f"option {key}": value for key, value in self._session_options.items()},
                "attention": ", ".join(f"{op} on {ep}" for ep, op in self._where.attention.items())
                or self.manifest.attention,
                "nodes": self._where.describe(),
                **(
                    {"provider_options": " ".join(f"{k}={v}" for k, v in self._options.items())}
                    if self._options
                    else {}
                ),
                **({"engine_build_s": round(self._build_s, 3), "shapes": str(self._shapes)} if self._shapes else {}),
                **self._fallbacks,
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

    def _bound(self, buffers: dict[str, NDArray[Any]], bind_cache: Callable[[Any], None], session: Any) -> Any:
        """A binding with the KV cache and host inputs bound; logits follow in :meth:`_bind_logits`."""
        binding = session.io_binding()
        bind_cache(binding)
        for name, array in buffers.items():
            if name in self.manifest.inputs:
                self._bind_input(binding, name, array)
        return binding

    @staticmethod
    def _bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
        """Bind host memory by address: no copy, but ``array`` must stay alive while the binding is used."""
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_logits(self, binding: Any, positions: int, rows: int) -> Callable[[], NDArray[Any]]:
        """Host memory for the logits; the provider copies them there (the CPU writes in place).

        Returns what gives them ``[rows, positions, vocab]`` after a run. bfloat16, which numpy lacks, comes as fp32.
        """
        shape = (rows, positions, self.manifest.vocab_size)
        if self._logits_dtype is None:
            device = self._provider.device
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, device, 0)
            binding.bind_ortvalue_output("logits", value)
            return lambda: to_fp32(value, device)
        logits: NDArray[Any] = np.empty(shape, self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        return lambda: logits

    def _new_cache(self, batch: int, tokens: int) -> SharedCache | GrowingCache:
        if self.manifest.kv.shared_buffer:
            return SharedCache(self.manifest.kv, batch, tokens, self.manifest.context_length, self._provider.device)
        return GrowingCache(self.manifest.kv, batch, self._provider.device)

    def _cache_for(self, batch: int, tokens: int) -> SharedCache | GrowingCache:
        """The buffers of the batch before where they fit, else new ones."""
        if isinstance(self._cache, SharedCache) and self._cache.holds(batch, tokens):
            self._cache.restore()
            return self._cache
        self._cache = None  # freed before the next one is allocated
        return self._new_cache(batch, tokens)

    @_all_or_nothing
    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start a batch; see :meth:`runtime.session.Session.prefill`."""
        self._require_open()
        lengths = check_prompts(ids, reserve, self.info)
        self._reset()
        tokens = max(lengths) + reserve
        if self._shapes:
            require_inside(self.manifest, self._shapes, "prefill", len(ids), max(lengths), 0)
        self._cache = self._cache_for(len(ids), tokens)
        self._device = None
        shared = self.manifest.kv.shared_buffer
        # A cache that grows by Concat has each row's new tokens right behind its old ones only when padded on the left;
        # graphs that attend to a window of the cache (GPT-Neo) count its columns.
        padded, mask = right_pad(ids) if shared else left_pad(ids)
        if self._one_by_one(lengths):
            last = self._prefill_rows(padded, lengths)
        else:
            ends = np.asarray(lengths) if shared else np.full(len(ids), max(lengths))
            last = self._prefill_batch(padded, mask, ends - 1)

        self._batch = len(ids)
        self._lengths = np.asarray(lengths, np.int64)
        self._end = tokens
        self._ids = np.zeros((self._batch, 1), np.int64)
        if shared:
            self._bind_steps()
        else:
            self._mask = np.ones((self._batch, tokens), np.int64)
            self._mask[:, : mask.shape[1]] = mask
            self._width = mask.shape[1]
        return last

    def _one_by_one(self, lengths: Sequence[int]) -> bool:
        """Whether rows are prefilled one after another.

        On the CPU one row keeps both cores busy, a batch only outgrows the caches and computes its padding; below
        :data:`_ROW_TOKENS` reading the weights is what takes the time, and a batch reads them once.
        """
        return (
            len(lengths) > 1
            and self._provider.device == "cpu"
            and self.manifest.kv.shared_buffer
            and min(lengths) >= _ROW_TOKENS
        )

    def _prefill_batch(self, padded: NDArray[np.int64], mask: NDArray[np.int64], last: NDArray[np.int64]) -> Logits:
        """All rows in one run; ``last`` is each row's last valid column."""
        assert self._cache is not None
        buffers = {"input_ids": padded, "attention_mask": mask, "position_ids": _positions(mask)}
        binding = self._bound(buffers, self._cache.bind, self._prefill)
        last_only = self.manifest.decode_logits == "last"
        logits = self._bind_logits(binding, 1 if last_only else padded.shape[1], len(padded))
        self._prefill.run_with_iobinding(binding, self._run_options)
        self._cache.taken(binding)
        return _fp32(logits()[:, 0] if last_only else logits()[np.arange(len(padded)), last])

    def _prefill_rows(self, padded: NDArray[np.int64], lengths: Sequence[int]) -> Logits:
        """Each row alone, into its place in the shared cache."""
        assert isinstance(self._cache, SharedCache)
        last_only = self.manifest.decode_logits == "last"
        out = np.empty((len(padded), self.manifest.vocab_size), np.float32)
        for row, length in enumerate(lengths):
            ids, mask = padded[row : row + 1, :length].copy(), np.ones((1, length), np.int64)
            buffers = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}
            binding = self._bound(buffers, partial(self._cache.bind_row, row=row), self._prefill)
            logits = self._bind_logits(binding, 1 if last_only else length, 1)
            self._prefill.run_with_iobinding(binding, self._run_options)
            out[row] = logits()[0, -1]
        return out

    @_all_or_nothing
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
        self._decode.run_with_iobinding(self._step_binding, self._run_options)
        return _fp32(self._step_logits()[:, 0])

    def _growing_step(self) -> Logits:
        assert self._cache is not None
        if self._shapes:
            require_inside(self.manifest, self._shapes, "decode", self._batch, 1, self._width)
        self._width += 1
        mask = np.ascontiguousarray(self._mask[:, : self._width])
        positions = self._lengths[:, None] - 1
        buffers = {"input_ids": self._ids, "attention_mask": mask, "position_ids": positions}
        binding = self._bound(buffers, self._cache.bind, self._decode)
        logits = self._bind_logits(binding, 1, self._batch)
        self._decode.run_with_iobinding(binding, self._run_options)
        self._cache.taken(binding)
        return _fp32(logits()[:, 0])

    @_all_or_nothing
    def prefill_argmax(self, ids: Ids, reserve: int = 1) -> NDArray[np.int64]:
        """Start a batch and return its first greedy tokens ``[batch]``; logits stay on the device.

        Raises: as :meth:`prefill`.
        """
        self._require_open()
        lengths = check_prompts(ids, reserve, self.info)
        self._reset()
        self._cache = cache = self._cache_for(len(ids), max(lengths) + reserve)
        assert isinstance(cache, SharedCache)
        before = self._device
        if before is None or before.kv is not cache or before.batch != len(ids):
            # Freed first; then a graph is captured for the new addresses.
            self._device = before = None
            self._device = before = self._device_decoder(cache)
        tokens = before.prefill(ids)
        self._batch, self._lengths, self._end = len(ids), np.asarray(lengths, np.int64), max(lengths) + reserve
        return tokens

    @_all_or_nothing
    def step_argmax(self) -> NDArray[np.int64]:
        """Append the tokens that came last and return the next ones; after :meth:`prefill_argmax` only."""
        self._require_open()
        longest = int(self._lengths.max()) if self._batch else 0
        check_step(range(self._batch), self._batch, longest, self._end)
        if self._device is None:
            raise SessionError("the batch was started with logits on the host; go on with step()")
        self._lengths += 1
        return self._device.step()

    def _device_decoder(self, cache: SharedCache) -> DeviceDecoder:
        return DeviceDecoder(self._decode, self.manifest.inputs, cache, self._provider.device, self._cuda_graph)

    @_all_or_nothing
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; see :meth:`runtime.session.Compacting.keep`."""
        self._require_open()
        check_rows(rows, self._batch)
        assert self._cache is not None
        self._cache.keep(rows, int(self._lengths.max()))
        self._batch, self._lengths = len(rows), self._lengths[list(rows)]
        if self._device is not None:
            assert isinstance(self._cache, SharedCache)
            self._device = self._device.keep(rows, self._cache, self._cuda_graph)
            return
        self._ids = np.zeros((self._batch, 1), np.int64)
        if self.manifest.kv.shared_buffer:
            self._bind_steps()
        else:
            self._mask = self._mask[list(rows)]

    def _bind_steps(self) -> None:
        """Bind once what every step of this batch uses."""
        assert self._cache is not None
        self._mask = np.ones(self._batch * self._end, np.int64)
        self._step_binding = self._bound({"input_ids": self._ids}, self._cache.bind, self._decode)
        self._step_logits = self._bind_logits(self._step_binding, 1, self._batch)

    @_all_or_nothing
    def score(self, ids: Sequence[int]) -> Logits:
        """Logits at all positions, from the scoring graph (opened on first use)."""
        self._require_open()
        check_prompts([ids], 0, self.info)
        if self._scoring is None:
            same = self.manifest.scoring_graph == self.manifest.decode_graph and self._shapes is None
            self._scoring = self._decode if same else self._open(self.manifest.scoring_graph, "score")
        self._reset()
        self._cache = None
        cache = self._new_cache(1, len(ids))
        padded, mask = right_pad([ids])
        positions = _positions(mask)
        buffers = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
        binding = self._bound(buffers, cache.bind, self._scoring)
        logits = self._bind_logits(binding, len(ids), 1)
        self._scoring.run_with_iobinding(binding, self._run_options)
        return _fp32(logits()[0])

    def close(self) -> None:
        """Free everything; closing twice is allowed."""
        self._closed = True
        self._reset()
        self._cache = self._decode = self._prefill = self._scoring = self._step_binding = self._device = None

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
