"""Target ``plain``: optimum's own graph, unchanged, for any decoder that optimum exports with past.

Nothing is fused and the model is held in memory, as optimum does it. What is ours: the manifest, the identity of the
weights, the checks of names and shapes, and that the folder appears whole or not at all.
Try: ``llama-onnx export CHECKPOINT OUT --target plain``.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import PretrainedConfig

from export.errors import GraphCheckError, UnsupportedModelError
from export.manifest import DECODE_GRAPH, ONNX_TYPE, KVLayout, first_line
from export.oldest_runtime import oldest_runtime
from export.optimum_adapter import require_optimum
from export.spec import ExportSpec
from export.weights import BUFFERS, Checkpoint, identity_of, tensor_identity


def require_exportable(config: PretrainedConfig) -> None:
    """Refuse an architecture that optimum does not export with past.

    Raises:
        MissingOptimumError: there is no optimum here.
        UnsupportedModelError: names the architecture.
    """
    require_optimum("--target plain")
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(config.model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if "text-generation-with-past" not in tasks:
        raise UnsupportedModelError(f"optimum has no export with KV cache for model type {config.model_type!r}")


def run_optimum(
    spec: ExportSpec, folder: Path, config: PretrainedConfig, work: Path, status: Callable[[str], None]
) -> dict[str, Any]:
    """Let optimum export ``folder`` to ``work`` and read what it made; see :func:`read_graph`.

    Raises:
        MissingOptimumError: there is no optimum here.
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
        raise UnsupportedModelError(
            f"optimum cannot export model type {config.model_type!r}: {first_line(e)}"
        ) from None
    finally:
        logging.disable(before)
    return read_graph(work, config)


def read_graph(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The manifest's facts of an optimum-style graph: one past input and one present output per layer and kind.

    Raises:
        GraphCheckError: another form.
        UnsupportedModelError: keys and values, or layers, of several sizes.
    """
    model = onnx.load(str(folder / DECODE_GRAPH), load_external_data=False)
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
    sizes = {
        tuple(d.dim_value for d in t.shape.dim)[1:4:2] for n, t in inputs.items() if n.startswith("past_key_values.")
    }
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: its KV cache is of several shapes ([heads, head size] "
            f"{', '.join(str(list(s)) for s in sorted(sizes))}), a cache here is of one"
        )
    dtype = next(name for name, number in ONNX_TYPE.items() if number == past.elem_type)
    read: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            read.setdefault(name, set()).add(node.op_type)
    operators = Counter(node.op_type for node in graph.node)
    looked_up = {"Gather"}  # an embedding: a step reads a row of it, not all
    weights = sum(
        math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in graph.initializer
        if read.get(t.name, set()) - looked_up
    )
    oldest, because = oldest_runtime(model)
    external = sorted({e.value for t in graph.initializer for e in t.external_data if e.key == "location"})
    return {
        "inputs": tuple(inputs),
        "outputs": outputs,
        "kv": KVLayout(layers, shape[1], shape[3], dtype, shared_buffer=False),
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "node_count": len(graph.node),
        "fused_ops": {op: operators[op] for op in ("Attention", "Gemm", "MatMul", "Softmax") if operators[op]},
        "decode_weight_bytes": weights,
        "data_file": external[0] if external else DECODE_GRAPH,
        "oldest_runtime": oldest,
        "oldest_because": because,
    }


def weights_of(checkpoint: Checkpoint) -> tuple[str, int]:
    """Identity of a checkpoint's weights as :func:`export.weights.write_data` computes it, and their number."""
    contents: dict[str, str] = {}
    parameters = 0
    for name in checkpoint.where:
        tensor: Any = checkpoint.read(name)
        if not name.endswith(BUFFERS):
            parameters += tensor.numel()
        contents[name] = tensor_identity(name, tensor if tensor.dtype != torch.bool else tensor.to(torch.uint8))
    return identity_of(contents), parameters
