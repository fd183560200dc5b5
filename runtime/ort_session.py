"""An exported folder on ONNX Runtime: how it is opened, what runs, and the batch that it holds.

Logits come to the host through :mod:`runtime.host_decode`, or stay on the device through
:mod:`runtime.device_decode`. Try: ``llama-onnx generate FOLDER "The capital of France is"``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import Manifest, first_line, release
from runtime.device_decode import GRAPH_KEY, NO_GRAPH, Captures, DeviceDecoder
from runtime.errors import ProviderUnavailableError, SessionError
from runtime.graph import Graph, fp32
from runtime.host_decode import HostDecoder
from runtime.huge_pages import collapse
from runtime.kv_cache import GrowingCache, SharedCache
from runtime.pipeline import PipelineMixin
from runtime.provider_options import options_of
from runtime.providers import (
    PROVIDERS,
    Provider,
    attach,
    placement,
    provider_list,
    require,
    require_active,
    require_placed,
)
from runtime.sampling import GREEDY, Sampling
from runtime.session import Ids, Logits, SessionInfo, check_prompts, check_rows, check_step, right_pad
from runtime.settings import PREFILL_CHUNK, SessionSettings, usable_cores
from runtime.tensorrt import Shapes, engine_options, require_inside
from runtime.trim import give_back
from runtime.turns import Guarded, guarded

_HUGE_PAGES_FROM = 64 << 20


class OrtSession(PipelineMixin, Guarded):
    """One exported folder, ready to run; see :class:`runtime.session.Session`.

    Args:
        folder: the exported folder, verified by the caller (:func:`runtime.load`).
        manifest: its manifest.
        settings: how it is opened.

    Raises:
        ProviderUnavailableError: the provider is not installed, did not load, or lacks an operator.
        SessionError: an ONNX Runtime older than the folder's operators demand.
    """

    def __init__(self, folder: Path, manifest: Manifest, settings: SessionSettings) -> None:
        super().__init__()
        if not settings.any_runtime:
            require_runtime(folder, manifest)
        self.folder = folder
        self.manifest = manifest
        self._allow_fallback, self._fallbacks = settings.allow_fallback, dict[str, str]()
        try:
            self._provider: Provider = require(settings.provider, manifest)
        except ProviderUnavailableError as e:
            if not settings.allow_fallback:
                raise
            self._fall_back(str(e))
        on_gpu = self._provider.device == "cuda"
        wants_device = on_gpu if settings.choose_on_device is None else settings.choose_on_device
        last_only = manifest.kv.shared_buffer and manifest.decode_logits == "last"
        # A cache that drops old tokens is filled row by row, which the host does.
        self.choose_on_device = wants_device and last_only and not manifest.kv.windows
        # The standard operators' graph computes its mask from shapes, on the host: nothing to capture.
        captures = self.choose_on_device and manifest.attention == "GroupQueryAttention"
        self._cuda_graph = settings.cuda_graph and self._provider.name == "cuda" and captures
        provider_options = dict(settings.provider_options or {})
        self._asked_for_capture = "enable_cuda_graph" in provider_options
        if self._cuda_graph:
            provider_options = {"enable_cuda_graph": "1", **provider_options}
        self._options = {} if self._fallbacks else options_of(settings.provider, provider_options)
        self._threads = settings.threads or usable_cores()
        self._shapes = (settings.shapes or Shapes()) if self._provider.name.startswith("tensorrt") else None
        self._engine_home, self._build_s = settings.engine_home, 0.0
        self._session_options = accuracy_level(manifest) | dict(settings.session_options or {})
        self._profile, self._log_severity = settings.profile, settings.log_severity
        chunked = self._provider.device == "cpu" and manifest.kv.shared_buffer
        chunk = PREFILL_CHUNK if settings.prefill_chunk is None else settings.prefill_chunk
        self._chunk = chunk if chunked else 0
        self._scoring: Graph | None = None
        self._one_graph = settings.one_graph and manifest.scoring_graph != manifest.decode_graph
        self._cache: SharedCache | GrowingCache | None = None
        self._host: HostDecoder | None = None
        self._device: DeviceDecoder | None = None
        self._whole: DeviceDecoder | None = None
        self._drop()
        started = time.perf_counter()
        self._open_decode()
        self._huge_bytes = 0
        if settings.huge_pages and self._provider.device == "cpu" and manifest.decode_weight_bytes > _HUGE_PAGES_FROM:
            self._huge_bytes = collapse()
        self.load_s = time.perf_counter() - started - self._build_s

    def _open_decode(self) -> None:
        self._decode = self._graph(self.manifest.decode_graph)
        self._prefill = self._graph(self.manifest.decode_graph, "prefill") if self._shapes else self._decode
        self._captures = Captures(self._decode.session, self._cuda_graph)

    def _need_decode(self) -> None:
        """Open the decode graph again where the scoring graph took its place."""
        if self._one_graph and self._scoring is not None:
            self._drop()
            self._scoring = None
            give_back()
            self._open_decode()

    def _need_scoring(self) -> Graph:
        """The scoring graph, opened on first use; with ``one_graph`` in the decode graph's place."""
        if self._scoring is None:
            same = self.manifest.scoring_graph == self.manifest.decode_graph and self._shapes is None
            if self._one_graph:
                self._drop()
                self._free()
                give_back()
            self._scoring = self._decode if same else self._graph(self.manifest.scoring_graph, "score")
        return self._scoring

    @guarded
    def scoring_session(self) -> Any:
        """ONNX Runtime's own session of the scoring graph, for those who bind a cache of their own.

        Do not hold it: with ``one_graph`` it would keep the weights in memory beside the decode graph's.
        """
        return self._need_scoring().session

    def _graph(self, file: str, phase: str = "decode") -> Graph:
        run_options: Any = None
        if self._cuda_graph:  # only what DeviceDecoder runs is captured
            run_options = ort.RunOptions()
            run_options.add_run_config_entry(GRAPH_KEY, str(NO_GRAPH))
        return Graph(self._open(file, phase), self.manifest, self._provider.device, run_options)

    def _open(self, graph: str, phase: str = "decode") -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = self._log_severity
        for key, value in self._session_options.items():
            options.add_session_config_entry(key, value)
        if self._profile is not None and phase == "decode":
            options.enable_profiling, options.profile_file_prefix = True, str(self._profile)
        chosen, built = self._engine_options(phase)
        attach(options, self._provider, chosen)
        started = time.perf_counter()
        try:
            session = ort.InferenceSession(
                str(self.folder / graph), sess_options=options, providers=provider_list(self._provider, chosen)
            )
        except Exception as e:  # onnxruntime raises its own C++-bound classes
            if self._cuda_graph and "graph capture" in str(e) and not self._asked_for_capture:
                self._cuda_graph, self._options = False, {**self._options, "enable_cuda_graph": "0"}
                self._fallbacks["cuda_graph_refused"] = first_line(e)
                return self._open(graph, phase)
            where = self.folder / graph
            raise SessionError(f"onnxruntime {ort.__version__} cannot open {where}: {first_line(e)}") from None
        if not built:
            self._build_s += time.perf_counter() - started
        session.disable_fallback()
        self._where = placement(session)
        if line := require_active(session, self._provider, self._allow_fallback):
            self._fall_back(line)
        if line := require_placed(self._where, self._provider, self._allow_fallback):
            self._fallbacks["partly_elsewhere"] = line
        return session

    def _engine_options(self, phase: str) -> tuple[dict[str, str], bool]:
        """The provider's options for one phase, and whether opening is mere loading (True but for TensorRT)."""
        if self._shapes is None:
            return self._options, True
        home, options = self._engine_home, self._options
        more, built = engine_options(self._provider.name, self.manifest, self._shapes, phase, home, options)
        return more | self._options, built

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
            cache_length=self.manifest.kv.cache_length,
            vocab_size=self.manifest.vocab_size,
            details={
                "onnxruntime": ort.__version__,
                "execution_provider": self._provider.ort_name,
                "intra_op_threads": self._threads,
                "graph_optimization": "all",
                "next_token": f"chosen on the {'device' if self.choose_on_device else 'host'}",
                **({"cuda_graph": self._cuda_graph} if self._provider.name == "cuda" else {}),
                **({"cuda_graphs_used_up": self._captures.made} if self._captures.used_up else {}),
                **({"prefill": f"in chunks of at most {self._chunk} tokens"} if self._chunk else {}),
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
                    + (f", {self.manifest.kv.cache_length} slots" if self.manifest.kv.cache_length else "")
                    if self.manifest.kv.shared_buffer
                    else "joined by Concat in each step"
                ),
            },
        )

    def _reset(self) -> None:
        """No batch; buffers stay."""
        self._batch = 0
        self._lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._end = 0
        self._host = self._device = None

    def _drop(self) -> None:
        self._reset()
        self._cache = self._whole = None

    def _free(self) -> None:
        self._captures.release()
        self._captures = Captures(None, False)
        self._decode = self._prefill = self._scoring = None  # type: ignore[assignment]

    def _new_cache(self, batch: int, tokens: int, whole: bool = False) -> SharedCache | GrowingCache:
        kv = self.manifest.kv
        if kv.shared_buffer:
            return SharedCache(kv, batch, tokens, self.manifest.context_length, self._provider.device, whole)
        return GrowingCache(kv, batch, self._provider.device)

    def _cache_for(self, batch: int, tokens: int) -> SharedCache | GrowingCache:
        """The buffers of the batch before where they fit, else new ones."""
        if isinstance(self._cache, SharedCache) and self._cache.holds(batch, tokens):
            self._cache.restore()
            return self._cache
        self._drop()  # freed before the next ones are allocated
        return self._new_cache(batch, tokens)

    def _begun(self, lengths: Sequence[int], reserve: int) -> None:
        """The prompts have run."""
        self._batch, self._lengths, self._end = len(lengths), np.asarray(lengths, np.int64), max(lengths) + reserve

    @guarded
    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """Start a batch; see :meth:`runtime.session.Session.prefill`."""
        lengths = check_prompts(ids, reserve, self.info)
        self._need_decode()
        self._reset()
        self._require_inside("prefill", len(ids), max(lengths))
        self._cache = self._cache_for(len(ids), max(lengths) + reserve)
        host = HostDecoder(self._prefill, self._decode, self._cache, self._shapes, self._chunk)
        last = host.prefill(ids, lengths, reserve)
        self._host = host
        self._begun(lengths, reserve)
        return last

    def _require_inside(self, phase: str, batch: int, new: int) -> None:
        """Refuse what TensorRT built no engine for."""
        if self._shapes:
            require_inside(self.manifest, self._shapes, phase, batch, new, 0)

    def _check_step(self, ids: Sequence[int]) -> None:
        check_step(ids, self._batch, int(self._lengths.max()) if self._batch else 0, self._end)

    @guarded
    def step(self, ids: Sequence[int]) -> Logits:
        """Append one token per row; see :meth:`runtime.session.Session.step`."""
        self._check_step(ids)
        if self._host is None:
            raise SessionError("the batch was started with logits on the device; go on with step_token()")
        lengths = self._lengths + 1
        logits = self._host.step(ids, lengths)
        self._lengths = lengths
        return logits

    @guarded
    def prefill_token(
        self, ids: Ids, reserve: int = 1, sampling: Sampling = GREEDY, numbers: NDArray[np.float64] | None = None
    ) -> NDArray[np.int64]:
        """Start a batch and return its first tokens ``[batch]``; logits stay on the device.

        Args:
            ids, reserve: as :meth:`prefill`.
            sampling: how the batch's tokens are chosen.
            numbers: ``[batch]``, one in [0, 1) for each row that draws its token; None for greedy.

        Raises:
            SessionError: a repetition penalty, which is the host's business; not one number per row that draws.
        """
        lengths = check_prompts(ids, reserve, self.info)
        if sampling.repetition_penalty != 1:
            raise SessionError("a repetition penalty is not applied on the device; use prefill() and a Chooser")
        _check_numbers(sampling, numbers, len(ids))
        self._need_decode()
        self._reset()
        self._require_inside("prefill", len(ids), max(lengths))
        self._cache = cache = self._cache_for(len(ids), max(lengths) + reserve)
        assert isinstance(cache, SharedCache)
        whole = self._whole
        if whole is None:  # it went with the buffers that it was bound to; a graph is captured for the new addresses
            graph_id = self._captures.new()
            whole = DeviceDecoder(
                self._decode.session,
                self.manifest.inputs,
                self.manifest.kv,
                cache,
                self._provider.device,
                graph_id,
                self._prefill.session,
            )
        tokens = whole.prefill(ids, sampling, numbers)
        self._whole = self._device = whole
        self._sampling = sampling
        self._begun(lengths, reserve)
        return tokens

    @guarded
    def step_token(self, numbers: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """Append the tokens that came last and return the next ones; after :meth:`prefill_token` only."""
        self._check_step(range(self._batch))
        if self._device is None:
            raise SessionError("the batch was started with logits on the host; go on with step()")
        _check_numbers(self._sampling, numbers, self._batch)
        self._lengths = self._lengths + 1
        return self._device.step(numbers)

    @guarded
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, renumbered from 0; the others leave the KV cache.

        Args:
            rows: places in the present batch, ascending.

        Raises:
            SessionError: no batch is open, no row, a row that is not there, or not ascending.
            ShapeOutsideProfileError: TensorRT built no engine for so few rows.
        """
        check_rows(rows, self._batch)
        if self.manifest.kv.cache_length is not None:  # a cache that grows is checked at each step
            self._require_inside("decode", len(rows), 1)
        assert self._cache is not None
        self._cache.keep(rows, int(self._lengths.max()))
        self._batch, self._lengths = len(rows), self._lengths[list(rows)]
        if self._device is not None:
            assert isinstance(self._cache, SharedCache)
            self._device = self._device.keep(rows, self._cache)
        if self._host is not None:
            self._host.keep(rows)

    @guarded
    def score(self, ids: Sequence[int]) -> Logits:
        """Logits at all positions, from the scoring graph (opened on first use)."""
        check_prompts([ids], 0, self.info)
        scoring = self._need_scoring()
        self._drop()
        cache = self._new_cache(1, len(ids), whole=True)
        padded, mask = right_pad([ids])
        logits, _ = scoring.once(padded, mask, cache.bind, len(ids))
        return fp32(logits[0])

    @guarded
    def end_profile(self) -> Path:
        """Stop profiling; the file that ONNX Runtime wrote (Chrome's trace format, times in microseconds).

        Raises:
            SessionError: opened without ``profile``, or stopped already.
        """
        if self._profile is None:
            raise SessionError("no profile is being made; open the session with profile=PATH")
        self._profile = None
        return Path(self._decode.session.end_profiling())


def require_runtime(folder: Path, manifest: Manifest) -> None:
    """Refuse an ONNX Runtime that is too old for the folder: it may compute something else without an error.

    Raises:
        SessionError: names both versions and the operator.
    """
    oldest = manifest.oldest_runtime
    if oldest and release(ort.__version__) < release(oldest):
        raise SessionError(
            f"onnxruntime {ort.__version__} is too old for {folder}, which needs {oldest} or newer: "
            f"{manifest.oldest_because}; install onnxruntime>={oldest} (or onnxruntime-gpu), or export without that "
            f"operator (docs/export.md says with which options)"
        )


def accuracy_level(manifest: Manifest) -> dict[str, str]:
    """The session option that says how MatMulNBits computes where ONNX Runtime makes it of DequantizeLinear."""
    if manifest.quantisation is None or "DequantizeLinear" not in manifest.fused_ops:
        return {}
    return {"session.qdq_matmulnbits_accuracy_level": str(manifest.quantisation.accuracy_level)}


def _check_numbers(sampling: Sampling, numbers: NDArray[np.float64] | None, batch: int) -> None:
    """Refuse a draw without its random numbers."""
    if not sampling.greedy and (numbers is None or numbers.shape != (batch,)):
        found = "none" if numbers is None else f"shape {list(numbers.shape)}"
        raise SessionError(f"a draw needs one random number a row, shape [{batch}], not {found}")
