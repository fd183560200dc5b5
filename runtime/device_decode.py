"""Decoding that stays on the device: logits, choice, next ids, mask and KV cache; one id a row crosses.

Two graphs take turns over fixed addresses: the model's, and a helper (:mod:`runtime.device_choice`) that chooses the
tokens, writes them where the model reads its ids, and lengthens the mask. The mask is as wide as the KV buffer from the
start, so every step has the same shapes and CUDA can capture the model's step as a graph (once per batch size and
buffer) and replay it. All of it runs on the CPU as well, which is where it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.manifest import KVLayout
from runtime.graph import placed, positions
from runtime.kv_cache import SharedCache
from runtime.sampling import GREEDY, Sampling
from runtime.session import Ids, right_pad

GRAPH_KEY = "gpu_graph_id"
NO_GRAPH = -1
"""ONNX Runtime's value of ``gpu_graph_id`` for a run that is neither captured nor replayed."""
MOST_CAPTURES = 64
"""Graphs that one session may capture in its life, since not every provider frees those that are released."""


class Captures:
    """The CUDA graphs of one session: one at a time, the one before it is released.

    Args:
        session: ONNX Runtime's.
        allowed: whether anything is captured at all.
    """

    def __init__(self, session: Any, allowed: bool) -> None:
        self._session, self.allowed = session, allowed
        self.made = 0
        self._open = NO_GRAPH

    def new(self) -> int:
        """The id under which the next step is captured; :data:`NO_GRAPH` when none may be any more."""
        self.release()
        if not self.allowed or self.used_up:
            return NO_GRAPH
        self.made += 1
        self._open = self.made
        return self._open

    @property
    def used_up(self) -> bool:
        """Whether further batch sizes and buffers run uncaptured."""
        return self.made >= MOST_CAPTURES

    def release(self) -> None:
        """Free the graph that was captured last; nothing may run under its id any more."""
        graph_id, self._open = self._open, NO_GRAPH
        free = getattr(self._session, "release_captured_graph", None)  # ONNX Runtime 1.32 has it, 1.31 does not
        if graph_id != NO_GRAPH and free is not None:
            with suppress(Exception):  # no run may have captured under that id yet
                free(graph_id)


class DeviceDecoder:
    """One batch size over one KV buffer.

    Args:
        session: the model's ONNX Runtime session, logits of the last position only.
        inputs: names of the graph's inputs.
        layout: of the KV cache, from the manifest.
        kv: the buffers, bound as past and present.
        device: ``cpu`` or ``cuda``.
        graph_id: under which the CUDA provider captures a decode step and replays it (its option
            ``enable_cuda_graph`` must be set); :data:`NO_GRAPH` for neither.
        prefill: the session that runs the prompts, where it is another one (TensorRT's engine for them).
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[str],
        layout: KVLayout,
        kv: SharedCache,
        device: str,
        graph_id: int = NO_GRAPH,
        prefill: Any = None,
    ) -> None:
        from runtime.device_choice import element_type

        self.kv, self.batch, self.graph_id = kv, kv.batch, graph_id
        self._session, self._inputs, self._layout, self._device = session, inputs, layout, device
        self._prefill = prefill or session
        self._logits_type = next(o.type for o in session.get_outputs() if o.name == "logits")
        self._vocab = next(o.shape[-1] for o in session.get_outputs() if o.name == "logits")
        self._ids = self._empty((self.batch, 1))
        self._lengths = self._empty((self.batch, 1))
        self._next_lengths = self._empty((self.batch, 1))
        self._mask = self._empty((self.batch, kv.capacity))
        self._places = self._put(np.arange(kv.capacity, dtype=np.int64)[None])
        self._numbers = self._put(np.zeros((self.batch, 1)))
        self._logits = ort.OrtValue.ortvalue_from_shape_and_type(
            [self.batch, 1, self._vocab], element_type(self._logits_type), device, 0
        )
        self._step = session.io_binding()
        kv.bind(self._step)
        self._step.bind_ortvalue_input("input_ids", self._ids)
        self._step.bind_ortvalue_input("attention_mask", self._mask)
        if "position_ids" in inputs:
            self._step.bind_ortvalue_input("position_ids", self._lengths)
        if "write_indices" in inputs:  # the same numbers in the same memory
            at = self._lengths.data_ptr()
            self._step.bind_input("write_indices", device, 0, np.int64, [self.batch], at)
        self._step.bind_ortvalue_output("logits", self._logits)
        self._plain, self._captured = ort.RunOptions(), ort.RunOptions()
        if device == "cuda":
            self._plain.add_run_config_entry(GRAPH_KEY, str(NO_GRAPH))
            self._captured.add_run_config_entry(GRAPH_KEY, str(graph_id))
        self._choose_by(GREEDY)

    def _put(self, array: NDArray[Any]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return self._put(np.zeros(shape, np.int64))

    def _choose_by(self, sampling: Sampling) -> None:
        """Take the helper for that; its parameters stay where they are for the whole batch."""
        from runtime.device_choice import choice_session

        self._sampling = sampling
        top_k, top_p = 0 < sampling.top_k < self._vocab, sampling.top_p < 1
        self._helper = choice_session(self._logits_type, self._device, not sampling.greedy, top_k, top_p)
        wanted = {i.name for i in self._helper.get_inputs()}
        given = {
            "temperature": np.array([sampling.temperature]),
            "top_p": np.array([sampling.top_p]),
            "top_k": np.array([sampling.top_k], np.int64),
        }
        # TopK reads its k on the host, wherever it runs.
        self._parameters = {
            name: ort.OrtValue.ortvalue_from_numpy(array) if name == "top_k" else self._put(array)
            for name, array in given.items()
            if name in wanted
        }
        if not sampling.greedy:
            self._parameters["numbers"] = self._numbers
        self._pick = self._pick_from(self._logits)

    def _pick_from(self, logits: Any) -> Any:
        """The helper's binding: reads logits and lengths, writes the next ids, mask and lengths."""
        binding = self._helper.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_ortvalue_input("lengths", self._lengths)
        binding.bind_ortvalue_input("places", self._places)
        for name, value in self._parameters.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("ids", self._ids)
        binding.bind_ortvalue_output("mask", self._mask)
        binding.bind_ortvalue_output("longer", self._next_lengths)
        return binding

    def prefill(
        self, ids: Ids, sampling: Sampling = GREEDY, numbers: NDArray[np.float64] | None = None
    ) -> NDArray[np.int64]:
        """Run the prompts and return each row's first token ``[batch]``.

        Args:
            ids: one prompt a row.
            sampling: how this batch's tokens are chosen; its repetition penalty is not applied.
            numbers: ``[batch]``, one in [0, 1) for each row; only a draw reads them.
        """
        if sampling != self._sampling:
            self._choose_by(sampling)
        padded, mask = right_pad(ids)
        binding = self._prefill.io_binding()
        self.kv.bind(binding)
        fed = {"input_ids": padded, "position_ids": positions(mask), **placed(self._layout, mask)}
        for name, array in fed.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, self._put(array))
        binding.bind_output("logits", self._device)
        self._prefill.run_with_iobinding(binding, self._plain)
        self._lengths.update_inplace(mask.sum(axis=1, keepdims=True))
        return self._tokens(self._pick_from(binding.get_outputs()[-1]), numbers)

    def step(self, numbers: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """Append the tokens that were chosen last and return the next ones ``[batch]``; see :meth:`prefill`."""
        self._session.run_with_iobinding(self._step, self._captured)
        self._lengths.update_inplace(self._next_lengths)  # on the device
        return self._tokens(self._pick, numbers)

    def _tokens(self, pick: Any, numbers: NDArray[np.float64] | None) -> NDArray[np.int64]:
        if numbers is not None:
            self._numbers.update_inplace(np.ascontiguousarray(numbers[:, None]))
        self._helper.run_with_iobinding(pick)
        tokens: NDArray[np.int64] = self._ids.numpy()[:, 0].copy()  # the one wait of a step
        return tokens

    def keep(self, rows: Sequence[int], kv: SharedCache) -> DeviceDecoder:
        """The same batch with these rows only, over buffers that were cut down already.

        Its steps are not captured: the graph would serve the rest of this one batch, at other addresses the next time.
        """
        smaller = DeviceDecoder(self._session, self._inputs, self._layout, kv, self._device)
        smaller._choose_by(self._sampling)
        for name in ("_ids", "_lengths", "_next_lengths", "_mask"):
            smaller.__dict__[name].update_inplace(np.ascontiguousarray(getattr(self, name).numpy()[list(rows)]))
        return smaller
