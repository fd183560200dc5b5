"""One opened ONNX graph, and how its inputs, its KV cache and its logits are bound to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import KVLayout, Manifest
from runtime.kv_cache import BFLOAT16, to_fp32
from runtime.session import Logits


class Graph:
    """A graph over the manifest's inputs.

    Args:
        session: ONNX Runtime's.
        manifest: of the folder that the graph is from.
        device: ``cpu`` or ``cuda``, where the logits come from.
        run_options: of every run; None for ONNX Runtime's own.
    """

    def __init__(self, session: Any, manifest: Manifest, device: str, run_options: Any = None) -> None:
        self.session, self.manifest, self.device = session, manifest, device
        self._run_options = run_options
        kind = next(o.type for o in session.get_outputs() if o.name == "logits")
        # None for bfloat16, which numpy lacks
        self._logits_dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(kind)

    def bind(self, buffers: dict[str, NDArray[Any]], bind_cache: Callable[[Any], None]) -> Any:
        """A binding with the KV cache and host inputs bound; logits follow in :meth:`bind_logits`."""
        binding = self.session.io_binding()
        bind_cache(binding)
        for name, array in buffers.items():
            if name in self.manifest.inputs:
                self.bind_input(binding, name, array)
        return binding

    @staticmethod
    def bind_input(binding: Any, name: str, array: NDArray[Any]) -> None:
        """Bind host memory by address: ``array`` must stay alive while the binding is used.

        The CPU reads it when it runs; a GPU provider copies it here, and sees no later change.
        """
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_logits(self, binding: Any, positions: int, rows: int) -> Callable[[], NDArray[Any]]:
        """Host memory for the logits; the provider copies them there (the CPU writes in place).

        Returns what gives them ``[rows, positions, vocab]`` after a run. bfloat16, which numpy lacks, comes as fp32.
        """
        shape = (rows, positions, self.manifest.vocab_size)
        if self._logits_dtype is None:
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, self.device, 0)
            binding.bind_ortvalue_output("logits", value)
            return lambda: to_fp32(value, self.device)
        logits: NDArray[Any] = np.empty(shape, self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        return lambda: logits

    def once(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        bind_cache: Callable[[Any], None],
        wanted: int,
        places: NDArray[np.int64] | None = None,
        start: int = 0,
    ) -> tuple[NDArray[Any], Any]:
        """Run new tokens with everything bound anew; logits ``[rows, wanted, vocab]``, and the binding.

        ``places`` are the tokens' positions, None for those that the mask says; ``start`` counts the tokens of each row
        that are in the cache already.
        """
        places = positions(mask)[:, start:] if places is None else places
        feed = {"input_ids": ids, "position_ids": np.ascontiguousarray(places), **placed(self.manifest.kv, mask, start)}
        binding = self.bind(feed, bind_cache)
        logits = self.bind_logits(binding, wanted, len(ids))
        self.run(binding)
        return logits(), binding

    def run(self, binding: Any) -> None:
        """Run what is bound."""
        self.session.run_with_iobinding(binding, self._run_options)


def placed(kv: KVLayout, mask: NDArray[np.int64], start: int = 0) -> dict[str, NDArray[np.int64]]:
    """What says where in the cache new tokens go and which slots count: ``attention_mask`` and ``write_indices``.

    Args:
        kv: layout of the cache; one of fixed length has a mask over all of its slots.
        mask: ``[batch, tokens so far]``, the new ones included.
        start: slot of the first new token.
    """
    if kv.cache_length is not None:
        wide = np.zeros((len(mask), kv.cache_length), np.int64)
        wide[:, : mask.shape[1]] = mask
        mask = wide
    return {"attention_mask": mask, "write_indices": np.full(len(mask), start, np.int64)}


def positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among its row's valid ones, ``[batch, width]``; padding gets the last one again."""
    found: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return found


def fp32(logits: NDArray[Any]) -> Logits:
    """The same numbers as fp32, without a copy where they are that already."""
    return logits.astype(np.float32, copy=False)
