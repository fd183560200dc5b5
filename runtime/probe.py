"""Runs a folder's graph with a cache of the caller's own, and shows values from inside it.

The gate needs what a :class:`runtime.session.Session` hides: a prompt in several chunks, a past of any length without
computing it, and the residual stream between layers. Not for serving: everything is copied.
Try: ``python -m pytest tests/bench/gate/test_checks.py -k chunked``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import KVLayout, Manifest, first_line
from runtime.errors import SessionError
from runtime.graph import placed
from runtime.kv_cache import NUMPY_DTYPE, Loud, SharedCache, tiled
from runtime.ort_session import OrtSession, accuracy_level
from runtime.provider_options import options_of
from runtime.providers import attach, provider_list, require, require_active
from runtime.settings import SessionSettings, usable_cores


@contextmanager
def _said(what: str) -> Iterator[None]:
    """ONNX Runtime's own C++-bound exceptions as ours."""
    try:
        yield
    except Exception as e:
        raise SessionError(f"onnxruntime {what}: {first_line(e)}") from None


def _cache_type(manifest: Manifest) -> Any:
    """numpy's type of the KV cache."""
    if manifest.kv.dtype not in NUMPY_DTYPE:
        raise SessionError(f"a {manifest.kv.dtype} cache cannot be probed: numpy has no such type")
    return NUMPY_DTYPE[manifest.kv.dtype]


class GraphProbe:
    """One graph of a folder on ONNX Runtime.

    Args:
        path: the graph; its data files beside it.
        manifest: of the folder.
        threads: intra-op threads.
        provider: ``cpu`` or ``cuda``, with its ``provider_options``; TensorRT would build an engine for this one graph.

    Raises:
        SessionError: ONNX Runtime cannot open the graph, or its cache is of a type that numpy lacks (bf16).
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        threads: int,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        if provider not in ("cpu", "cuda"):
            raise SessionError(f"a graph cannot be probed on {provider}: it would build an engine for it")
        require(provider, manifest)
        self.dtype = _cache_type(manifest)
        settings = SessionSettings(
            provider, threads, provider_options=provider_options, session_options=accuracy_level(manifest)
        )
        session = open_graph(path, settings)
        self._opened: Callable[[], Any] = lambda: session
        self._manifest = manifest

    @classmethod
    def of(cls, session: OrtSession) -> GraphProbe:
        """Over the scoring graph that a session has open already, so that its weights are in memory once.

        Raises:
            SessionError: as above; or the session does not run on the CPU.
        """
        made = cls.__new__(cls)
        made.dtype = _cache_type(session.manifest)
        made._opened = session.scoring_session  # asked at each run, never held: the session may give the graph up
        made._manifest = session.manifest
        return made

    def run(
        self,
        ids: Sequence[int],
        past: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
        outputs: Sequence[str] = ("logits",),
    ) -> dict[str, NDArray[Any]]:
        """One row of new tokens after a past.

        Args:
            ids: the new tokens.
            past: per layer a key and a value ``[1, kv_heads, tokens, head_dim]``; None for none.
            outputs: names of graph outputs.

        Raises:
            SessionError: ONNX Runtime stopped.
        """
        kv = self._manifest.kv
        session = self._opened()
        length = past[0][0].shape[2] if past else 0
        feeds: dict[str, Any] = _new(kv, ids, length)
        empty = np.zeros((1, kv.kv_heads, kv.cache_length or 0, kv.head_dim), self.dtype)
        for layer in range(kv.layers):
            for kind, part in zip(("key", "value"), past[layer] if past else (empty, empty), strict=True):
                whole = part.astype(self.dtype, copy=False)
                if kv.cache_length is not None:
                    whole = empty.copy()
                    whole[:, :, : part.shape[2]] = part
                feeds[f"past_key_values.{layer}.{kind}"] = whole
        inputs = {i.name for i in session.get_inputs()}
        with _said("stopped"):
            found = session.run(list(outputs), {k: v for k, v in feeds.items() if k in inputs})
        total = length + len(ids)  # a cache of fixed length is longer
        return {n: v[:, :, :total] if n.startswith("present.") else v for n, v in zip(outputs, found, strict=True)}

    def after_past(
        self,
        ids: Sequence[int],
        first: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        length: int,
        loud: Loud | None = None,
    ) -> NDArray[Any]:
        """Logits of new tokens after a long past that is ``first`` tiled.

        Where past and present share memory, the past is there once, in the buffers that the graph writes into: 8,000
        positions of the demo model take 0.4 GB, and twice that in :meth:`run`.

        Args:
            ids: the new tokens.
            first: per layer a key and a value ``[1, kv_heads, some, head_dim]``.
            length: tokens of the past.
            loud: one of them whose values count more.

        Returns:
            ``[positions, vocab]``; all new positions, or the last one if the graph gives no more.

        Raises:
            SessionError: ONNX Runtime stopped.
        """
        kv = self._manifest.kv
        if not kv.shared_buffer:
            past = [(tiled(k, length), tiled(v, length, loud)) for k, v in first]
            found: NDArray[Any] = self.run(ids, past)["logits"][0]
            return found
        session = self._opened()
        cache = SharedCache(kv, 1, length + len(ids), self._manifest.context_length, "cpu", whole=True)
        for layer, pair in enumerate(first):
            cache.lay(layer, pair, length, loud)
        inputs = {i.name for i in session.get_inputs()}
        binding = session.io_binding()
        binding.bind_output("logits", "cpu")
        cache.bind(binding)
        for name, array in _new(kv, ids, length).items():
            if name in inputs:
                binding.bind_cpu_input(name, array)
        with _said("stopped"):
            session.run_with_iobinding(binding)
        logits: NDArray[Any] = binding.get_outputs()[0].numpy()[0]
        return logits

    def presents(self, found: Mapping[str, NDArray[Any]]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """The cache of a run whose outputs were :attr:`present_names`."""
        layers = range(self._manifest.kv.layers)
        return [(found[f"present.{i}.key"], found[f"present.{i}.value"]) for i in layers]

    @property
    def present_names(self) -> list[str]:
        """Names of the cache's outputs."""
        return [f"present.{i}.{kind}" for i in range(self._manifest.kv.layers) for kind in ("key", "value")]

    def close(self) -> None:
        """Free the graph, unless it is another session's."""
        self._opened = _closed


def open_graph(graph: Path | bytes, settings: SessionSettings, optimise: bool = True) -> Any:
    """ONNX Runtime's own session over a file, or a model in memory, on the provider that was asked for and no other.

    Raises:
        ProviderUnavailableError: the provider does not load here.
        SessionError: ONNX Runtime cannot open it.
    """
    provider = require(settings.provider, None)
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads or usable_cores()
    options.log_severity_level = settings.log_severity
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (settings.session_options or {}).items():
        options.add_session_config_entry(key, value)
    given = options_of(settings.provider, settings.provider_options)
    attach(options, provider, given)
    where, source = ("a graph", graph) if isinstance(graph, bytes) else (str(graph), str(graph))
    with _said(f"cannot open {where}"):
        session: Any = ort.InferenceSession(source, options, providers=provider_list(provider, given))
    require_active(session, provider)
    return session


def run_once(
    graph: Path,
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    settings: SessionSettings,
    optimise: bool = True,
) -> dict[str, NDArray[Any]]:
    """Any graph opened, run once and closed: what it gives for ``outputs`` by name.

    Args:
        graph: the file; its data files beside it.
        feeds: its inputs; more are left out.
        outputs: names of its outputs.
        settings: provider, threads, options.
        optimise: whether ONNX Runtime may change the graph.

    Raises:
        ProviderUnavailableError: the provider does not load here.
        SessionError: ONNX Runtime cannot open it, or stopped.
    """
    session = open_graph(graph, settings, optimise)
    inputs = {i.name for i in session.get_inputs()}
    with _said("stopped"):
        found = session.run(list(outputs), {k: v for k, v in feeds.items() if k in inputs})
    return dict(zip(outputs, found, strict=True))


def _closed() -> Any:
    raise SessionError("the probe is closed; open a new one")


def _new(kv: KVLayout, ids: Sequence[int], length: int) -> dict[str, NDArray[np.int64]]:
    """The inputs beside the cache for ``ids`` after ``length`` tokens, one row."""
    total = length + len(ids)
    return {
        "input_ids": np.asarray([ids], np.int64),
        "position_ids": np.arange(length, total, dtype=np.int64)[None],
        **placed(kv, np.ones((1, total), np.int64), length),
    }
