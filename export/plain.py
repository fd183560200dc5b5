"""Target ``plain``: optimum's own graph, unchanged, for any decoder that optimum exports with past.

Nothing is fused and the model is held in memory, as optimum does it. What is ours: the manifest, the identity of the
weights, the checks of names and shapes, and that the folder appears whole or not at all.
Try: ``llama-onnx export CHECKPOINT OUT --target plain``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from transformers import PretrainedConfig

from export.errors import GraphCheckError, UnsupportedModelError
from export.manifest import KVLayout
from export.spec import ExportSpec
from export.weights import Checkpoint, tensor_identity

GRAPH = "model.onnx"
_ELEMENT = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class PlainGraph:
    """Facts of optimum's graph that go into the manifest."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kv: KVLayout
    opset: int
    node_count: int
    operators: dict[str, int]
    decode_weight_bytes: int
    data_file: str


def require_exportable(config: PretrainedConfig) -> None:
    """Refuse an architecture that optimum does not export with past.

    Raises:
        UnsupportedModelError: names the architecture.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(config.model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if "text-generation-with-past" not in tasks:
        raise UnsupportedModelError(f"optimum has no export with KV cache for model type {config.model_type!r}")


def run_optimum(
    spec: ExportSpec, folder: Path, config: PretrainedConfig, work: Path, status: Callable[[str], None]
) -> PlainGraph:
    """Let optimum export ``folder`` to ``work`` and read what it made.

    Raises:
        UnsupportedModelError: optimum cannot, with its reason.
        GraphCheckError: the graph lacks a cache input or has other shapes than it should.
    """
    require_exportable(config)
    from optimum.exporters.onnx import main_export

    status("optimum exports (in memory)")
    options = {} if spec.precision == "fp32" else {"dtype": spec.precision}
    quiet = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            main_export(
                str(folder),
                output=str(work),
                task="text-generation-with-past",
                do_validation=False,  # against the unpatched model, later, by the gate
                no_post_process=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
    except Exception as e:  # onnxruntime's own classes among them
        first = (str(e).splitlines() or [type(e).__name__])[0][:300]
        raise UnsupportedModelError(f"optimum cannot export model type {config.model_type!r}: {first}") from None
    finally:
        logging.disable(before)
    return read_graph(work, config)


def read_graph(folder: Path, config: PretrainedConfig) -> PlainGraph:
    """Facts of an optimum-style graph: one past input and one present output per layer and kind.

    Raises:
        GraphCheckError: another form.
    """
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    graph = model.graph
    inputs = {i.name: i.type.tensor_type for i in graph.input}
    outputs = tuple(o.name for o in graph.output)
    layers = sum(name.startswith("past_key_values.") for name in inputs) // 2
    wrong = [
        name
        for layer in range(layers)
        for kind in ("key", "value")
        for name in (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        if name not in inputs and name not in outputs
    ]
    if layers != config.num_hidden_layers or wrong or "logits" not in outputs:
        raise GraphCheckError(
            f"optimum's graph has {layers} cached layers where the config demands {config.num_hidden_layers}"
            + (f", and lacks {wrong[0]}" if wrong else "")
        )
    past = inputs["past_key_values.0.key"]
    shape = [d.dim_value for d in past.shape.dim]
    if len(shape) != 4 or not shape[1] or not shape[3]:
        raise GraphCheckError(f"past_key_values.0.key has shape {shape}, not [batch, heads, tokens, head size]")
    read: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            read.setdefault(name, set()).add(node.op_type)
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    looked_up = {"Gather"}  # an embedding: a step reads a row of it, not all
    weights = sum(_nbytes(t) for t in graph.initializer if read.get(t.name, set()) - looked_up)
    external = sorted({e.value for t in graph.initializer for e in t.external_data if e.key == "location"})
    return PlainGraph(
        inputs=tuple(inputs),
        outputs=outputs,
        kv=KVLayout(layers, shape[1], shape[3], _ELEMENT[past.elem_type], shared_buffer=False),
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        node_count=len(graph.node),
        operators={op: n for op, n in sorted(operators.items()) if op in ("Softmax", "MatMul", "Gemm", "Attention")},
        decode_weight_bytes=weights,
        data_file=external[0] if external else GRAPH,
    )


def _nbytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_location == TensorProto.EXTERNAL:
        return int(math.prod(tensor.dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return int(numpy_helper.to_array(tensor).nbytes)


def identity_of(checkpoint: Checkpoint) -> tuple[str, int]:
    """Identity of a checkpoint's weights as :func:`export.weights.write_data` computes it, and their number."""
    lines: list[str] = []
    parameters = 0
    for name in sorted(checkpoint.where):
        tensor: Any = checkpoint.read(name)
        if not name.endswith((".attn.masked_bias", ".attn.bias", ".attention.bias", ".attention.masked_bias")):
            parameters += tensor.numel()
        lines.append(tensor_identity(name, tensor if tensor.dtype != torch.bool else tensor.to(torch.uint8)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), parameters
