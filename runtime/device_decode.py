"""Greedy decoding that stays on the device: logits, argmax, next ids, mask and KV cache; one id a row crosses.

Two graphs take turns over fixed addresses: the model's, and a helper that takes the argmax, writes it where the model
reads its ids, and lengthens the mask. The mask is as wide as the KV buffer from the start, so every step has the same
shapes and CUDA can capture the model's step as a graph (once per batch size and buffer) and replay it. All of it runs
on the CPU as well, which is where it is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.kv_cache import SharedCache, small_session
from runtime.session import Ids, right_pad

_GRAPH_IDS = itertools.count(1)
GRAPH_KEY = "gpu_graph_id"
NO_GRAPH = "-1"
"""ONNX Runtime's value of ``gpu_graph_id`` for a run that is neither captured nor replayed."""


class DeviceDecoder:
    """One batch size over one KV buffer.

    Args:
        session: the model's ONNX Runtime session, logits of the last position only.
        inputs: names of the graph's inputs.
        kv: the buffers, bound as past and present.
        device: ``cpu`` or ``cuda``.
        cuda_graph: let the CUDA provider capture a decode step (its option ``enable_cuda_graph`` must be set).
    """

    def __init__(self, session: Any, inputs: Sequence[str], kv: SharedCache, device: str, cuda_graph: bool) -> None:
        self.kv, self.batch = kv, kv.batch
        self._session, self._inputs, self._device = session, inputs, device
        logits_type = next(o.type for o in session.get_outputs() if o.name == "logits")
        vocab = next(o.shape[-1] for o in session.get_outputs() if o.name == "logits")
        self._helper = _advance_session(logits_type, device)
        self._ids = self._empty((self.batch, 1))
        self._lengths = self._empty((self.batch, 1))
        self._next_lengths = self._empty((self.batch, 1))
        self._mask = self._empty((self.batch, kv.capacity))
        self._places = self._put(np.arange(kv.capacity, dtype=np.int64)[None])
        element = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}[logits_type]
        self._logits = ort.OrtValue.ortvalue_from_shape_and_type([self.batch, 1, vocab], element, device, 0)
        self._step = session.io_binding()
        kv.bind(self._step)
        self._step.bind_ortvalue_input("input_ids", self._ids)
        self._step.bind_ortvalue_input("attention_mask", self._mask)
        if "position_ids" in inputs:
            self._step.bind_ortvalue_input("position_ids", self._lengths)
        self._step.bind_ortvalue_output("logits", self._logits)
        self._pick = self._pick_from(self._logits)
        self._plain, self._captured = ort.RunOptions(), ort.RunOptions()
        self.graph_id = str(next(_GRAPH_IDS)) if cuda_graph else NO_GRAPH
        if device == "cuda":
            self._plain.add_run_config_entry(GRAPH_KEY, NO_GRAPH)
            self._captured.add_run_config_entry(GRAPH_KEY, self.graph_id)

    def _put(self, array: NDArray[Any]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _empty(self, shape: tuple[int, ...]) -> Any:
        return self._put(np.zeros(shape, np.int64))

    def _pick_from(self, logits: Any) -> Any:
        """The helper's binding: reads logits and lengths, writes the next ids, mask and lengths."""
        binding = self._helper.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_ortvalue_input("lengths", self._lengths)
        binding.bind_ortvalue_input("places", self._places)
        binding.bind_ortvalue_output("ids", self._ids)
        binding.bind_ortvalue_output("mask", self._mask)
        binding.bind_ortvalue_output("longer", self._next_lengths)
        return binding

    def prefill(self, ids: Ids) -> NDArray[np.int64]:
        """Run the prompts and return each row's first token ``[batch]``."""
        padded, mask = right_pad(ids)
        binding = self._session.io_binding()
        self.kv.bind(binding)
        fed = {"input_ids": padded, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
        for name, array in fed.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, self._put(array))
        binding.bind_output("logits", self._device)
        self._session.run_with_iobinding(binding, self._plain)
        self._lengths.update_inplace(mask.sum(axis=1, keepdims=True))
        return self._tokens(self._pick_from(binding.get_outputs()[-1]))

    def step(self) -> NDArray[np.int64]:
        """Append the tokens that were chosen last and return the next ones ``[batch]``."""
        self._session.run_with_iobinding(self._step, self._captured)
        self._lengths.update_inplace(self._next_lengths)  # on the device
        return self._tokens(self._pick)

    def _tokens(self, pick: Any) -> NDArray[np.int64]:
        self._helper.run_with_iobinding(pick)
        tokens: NDArray[np.int64] = self._ids.numpy()[:, 0].copy()  # the one wait of a step
        return tokens

    def keep(self, rows: Sequence[int], kv: SharedCache, cuda_graph: bool) -> DeviceDecoder:
        """The same batch with these rows only, over buffers that were cut down already."""
        smaller = DeviceDecoder(self._session, self._inputs, kv, self._device, cuda_graph)
        for name in ("_ids", "_next_lengths", "_mask"):
            smaller.__dict__[name].update_inplace(np.ascontiguousarray(getattr(self, name).numpy()[list(rows)]))
        return smaller


@cache
def _advance_session(logits_type: str, device: str) -> Any:
    """``logits [b, 1, v], lengths [b, 1], places [1, c] -> ids [b, 1], mask [b, c], longer [b, 1]``.

    ``lengths`` counts the tokens in the cache; the mask also covers the token that was just chosen.
    """
    from onnx import TensorProto, helper, numpy_helper

    element = {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}.get(
        logits_type, TensorProto.BFLOAT16
    )

    def value(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    whole = TensorProto.INT64
    nodes = [
        helper.make_node("Cast", ["logits"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["wide"], ["ids"], axis=2, keepdims=0),
        helper.make_node("Add", ["lengths", "one"], ["longer"]),
        helper.make_node("Less", ["places", "longer"], ["seen"]),
        helper.make_node("Cast", ["seen"], ["mask"], to=whole),
    ]
    graph = helper.make_graph(
        nodes,
        "advance",
        [value("logits", element, "b", 1, "v"), value("lengths", whole, "b", 1), value("places", whole, 1, "c")],
        [value("ids", whole, "b", 1), value("mask", whole, "b", "c"), value("longer", whole, "b", 1)],
        [numpy_helper.from_array(np.array(1, np.int64), "one")],
    )
    return small_session(graph, device)
