"""Folders that other tools exported: what is known about them, and what is not.

optimum's graphs and onnxruntime-genai's are read from their ONNX file and their configurations into the same
:class:`export.manifest.Manifest` that our own folders carry, so that everything else treats them alike. What had to be
inferred stands in ``notes``. Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from export.manifest import (
    ATTENTIONS,
    DECODE_GRAPH,
    GENAI_CONFIG,
    MATMULS,
    NORMS,
    ONNX_TYPE,
    SCORING_GRAPH,
    FileEntry,
    KVLayout,
    Manifest,
    Quantisation,
)
from export.oldest_runtime import oldest_runtime
from export.sizes import ASSUMED_CONTEXT, NO_CONTEXT, head_dim_of, stated_context
from runtime.errors import SessionError
from runtime.stored_weights import stored_weights
from runtime.trust import check_graph

GRAPHS = (DECODE_GRAPH, "decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx")
"""File names that optimum has used, the present one first."""
FUSED = (*ATTENTIONS, *NORMS, *MATMULS, "RotaryEmbedding", "Softmax")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TYPES = {number: name for name, number in ONNX_TYPE.items()}


class ForeignFolderError(SessionError):
    """An ONNX folder whose layout is not one that this runtime drives."""


def describe(folder: Path) -> Manifest:
    """A manifest for a folder that has none.

    Raises:
        ForeignFolderError: no graph, or inputs and outputs of a form that is not known.
        UntrustedModelError: see :func:`runtime.trust.check_graph`.
    """
    _one_folder(folder)
    genai = _json(folder / GENAI_CONFIG)
    config = _json(folder / "config.json")
    genai_model = _part(genai, "model")
    name = _part(genai, "model", "decoder").get("filename")
    name = name or next((n for n in GRAPHS if (folder / n).is_file()), None)
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise ForeignFolderError(
            f"{folder} has neither manifest.json nor a graph under a known name ({', '.join(GRAPHS)}); "
            f"pass the folder that an export wrote"
        )
    model = check_graph(folder / name)
    graph = model.graph
    counts = Counter(node.op_type for node in graph.node)
    if counts["If"]:
        raise ForeignFolderError(
            f"{folder / name} is a merged graph (an If over two decoders), which this runtime does not drive; "
            f"export again with optimum 1.14 or later, which writes one graph"
        )
    if any(a.name == "sliding_window_cache" and a.i for node in graph.node for a in node.attribute):
        raise ForeignFolderError(
            f"{folder / name} keeps caches as short as its attention window (sliding_window_cache), which this runtime "
            f"does not drive; build it with --extra_options windowed_kv_cache=false"
        )
    inputs = {i.name: i.type.tensor_type for i in graph.input}
    outputs = {o.name: o.type.tensor_type for o in graph.output}
    hint = _number(_part(genai, "model", "decoder"), "head_size") or head_dim_of(config)
    kv = _kv_layout(folder / name, inputs, outputs, counts, hint)
    notes = ["no manifest: the weights' identity is not known, no hash was checked"]
    maker = "onnxruntime-genai's builder" if genai else "optimum or another tool"
    notes.append(f"made by {model.producer_name or 'an unnamed tool'}, laid out as {maker} does")
    precision, quantisation = _precision(model, kv.dtype, notes)
    vocab = _dim(outputs["logits"], 2) or _number(config, "vocab_size") or _number(genai_model, "vocab_size")
    if not vocab:
        raise ForeignFolderError(f"{folder}: neither the graph nor config.json says how large the vocabulary is")
    context = stated_context(config) or _number(genai_model, "context_length")
    if not context:
        context = ASSUMED_CONTEXT
        notes.append(NO_CONTEXT)
    eos = _eos(folder, config, genai_model)
    if not eos:
        notes.append("no end-of-sequence token is named: generation ends at the length limit only")
    attention = next((op for op in ("Attention", "GroupQueryAttention") if counts[op]), "unfused")
    if counts["MultiHeadAttention"]:
        notes.append("MultiHeadAttention: its padding rules are taken to be those of an unfused graph")
    looked_up = _only_gathered(graph)
    scoring = _scoring_graph(folder, name)
    oldest, because = oldest_runtime(model)
    files = {
        p.name: FileEntry(p.stat().st_size, "") for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."
    }
    return Manifest(
        schema_version=0,
        created_utc="",
        spec={},
        spec_digest="",
        model_name=str(config.get("_name_or_path") or folder.resolve().name),
        model_type=str(config.get("model_type") or genai_model.get("type") or "unknown"),
        weights_sha256="",
        weights_origin="unknown (a third-party export)",
        source_key="",
        parameters=sum(_elements(t) for t in graph.initializer if len(t.dims) > 1),
        precision=precision,
        activations=kv.dtype,
        quantisation=quantisation,
        target="ort" if attention == "GroupQueryAttention" else "plain",
        attention=attention,
        padding="right" if attention == "GroupQueryAttention" else "any",
        decode_logits="last" if scoring != name or _dim(outputs["logits"], 1) == 1 else "all",
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        vocab_size=vocab,
        context_length=context,
        eos_token_ids=eos,
        decode_graph=name,
        scoring_graph=scoring,
        data_file=next((e.value for t in graph.initializer for e in t.external_data if e.key == "location"), name),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        kv=kv,
        fused_ops={op: counts[op] for op in FUSED if counts[op]},
        node_count=len(graph.node),
        decode_weight_bytes=sum(_nbytes(t) for t in graph.initializer if t.name not in looked_up),
        weights=(),
        versions={},
        files=files,
        notes=tuple(notes),
        oldest_runtime=oldest,
        oldest_because=because,
    )


def _one_folder(folder: Path) -> None:
    """Refuse, by name, the layout in which graphs lie in ``onnx/`` below config.json and the tokenizer."""
    inside = folder.absolute().name == "onnx"
    above, below = (folder.absolute().parent, folder) if inside else (folder, folder / "onnx")
    graphs = sorted(p.name for p in below.glob("*.onnx"))
    beside = any((below / name).is_file() for name in ("config.json", GENAI_CONFIG))
    if graphs and not beside and (above / "config.json").is_file() and not any(above.glob("*.onnx")):
        raise ForeignFolderError(
            f"{above} has its graphs in onnx/ ({', '.join(graphs)[:80]}) and config.json and the tokenizer above them; "
            f"copy one graph with its data file and these into one folder, the graph as {DECODE_GRAPH}"
        )


def _scoring_graph(folder: Path, decode: str) -> str:
    """Our own layout, whose manifest was left behind, has a second graph that gives the logits of every position."""
    if decode == DECODE_GRAPH and (folder / SCORING_GRAPH).is_file():
        check_graph(folder / SCORING_GRAPH)
        return SCORING_GRAPH
    return decode


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ForeignFolderError(f"{path} is not valid JSON ({str(e)[:80]}); copy it again") from None
    if not isinstance(raw, dict):
        raise ForeignFolderError(f"{path} is not a JSON object; copy it again")
    return raw


def _part(raw: dict[str, Any], *path: str) -> dict[str, Any]:
    """A nested object, {} where it is absent or something else."""
    for name in path:
        inner = raw.get(name)
        raw = inner if isinstance(inner, dict) else {}
    return raw


def _number(raw: dict[str, Any], *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _dim(tensor: Any, axis: int) -> int:
    """A static dimension, 0 when it is dynamic or absent."""
    dims = tensor.shape.dim
    return int(dims[axis].dim_value) if len(dims) > axis else 0


def _kv_layout(
    path: Path, inputs: dict[str, Any], outputs: dict[str, Any], counts: Counter[str], head_size: int
) -> KVLayout:
    past = {n: t for n, t in inputs.items() if _PAST.fullmatch(n)}
    length = (
        _dim(past["past_key_values.0.key"], 2) if counts["TensorScatter"] and "past_key_values.0.key" in past else 0
    )
    known = {"input_ids", "attention_mask", "position_ids", *past} | ({"write_indices"} if length else set())
    strange = sorted(set(inputs) - known)
    if strange or "input_ids" not in inputs:
        raise ForeignFolderError(
            f"{path} has the inputs {', '.join(sorted(inputs))[:200]}; this runtime drives input_ids, attention_mask, "
            f"position_ids and past_key_values.N.key/value"
        )
    layers = len(past) // 2
    wanted = {f"{p}.{i}.{k}" for p in ("past_key_values", "present") for i in range(layers) for k in ("key", "value")}
    lacking = sorted(wanted - set(inputs) - set(outputs))
    if not past or lacking or "logits" not in outputs:
        thing = lacking[0] if lacking else ("KV cache inputs" if not past else "logits")
        raise ForeignFolderError(f"{path} lacks {thing}; export it with past (task text-generation-with-past)")
    first = past["past_key_values.0.key"]
    heads, size = _dim(first, 1), _dim(first, 3) or head_size
    if len(first.shape.dim) != 4 or not heads or not size:
        raise ForeignFolderError(
            f"{path}: past_key_values.0.key is not [batch, heads, tokens, head size] with fixed heads and size"
        )
    if len({(_dim(t, 1), _dim(t, 3)) for t in past.values()}) > 1:
        raise ForeignFolderError(f"{path}: keys and values, or layers, of several sizes; this runtime drives one size")
    if first.elem_type not in _TYPES:
        raise ForeignFolderError(f"{path}: KV cache of ONNX type {first.elem_type}; fp32, fp16 and bf16 are known")
    shared = counts["GroupQueryAttention"] > 0 or length > 0
    return KVLayout(layers, heads, size, _TYPES[first.elem_type], shared, length or None)


def _precision(model: Any, activations: str, notes: list[str]) -> tuple[str, Quantisation | None]:
    """What most of the weights are stored as, by their elements."""
    leaves = {t.name: t for t in model.graph.initializer}
    weights = [w for w in stored_weights(model, leaves) if len(w.shape) > 1]
    sizes: Counter[str] = Counter()
    for w in weights:
        sizes[{"fp64": "fp32", "int2": "int4"}.get(w.kind, w.kind)] += w.elements
    if not sizes:
        notes.append("no float weights found: the precision is that of the KV cache")
        return activations, None
    if len(sizes) > 1:
        notes.append("weights of several types: " + ", ".join(f"{kind} {n:,}" for kind, n in sizes.most_common()))
    name = sizes.most_common(1)[0][0]
    if not name.startswith("int"):
        return name, None
    notes.append("the quantiser's method cannot be told from the graph")
    first = next(({a.name: a.i for a in n.attribute} for n in model.graph.node if n.op_type == "MatMulNBits"), {})
    block, level = (first.get(key, 0) for key in ("block_size", "accuracy_level"))
    return name, Quantisation(name, "unknown", block, level, "unknown", "unknown", "unknown", "unknown")


def _elements(tensor: Any) -> int:
    return math.prod(tensor.dims)


def _nbytes(tensor: Any) -> int:
    return _elements(tensor) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _only_gathered(graph: Any) -> set[str]:
    """Initialisers of which a decode step reads rows only: embeddings and rotary tables."""
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            table = node.op_type in ("GroupQueryAttention", "RotaryEmbedding") and i > 0
            readers.setdefault(name, set()).add("Gather" if table else node.op_type)
    return {name for name, ops in readers.items() if ops <= {"Gather", "GatherBlockQuantized"}}


def _eos(folder: Path, config: dict[str, Any], genai_model: dict[str, Any]) -> tuple[int, ...]:
    for raw in (_json(folder / "generation_config.json"), genai_model, config):
        value = raw.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        if value is not None and all(isinstance(v, int) for v in values):
            return tuple(values)
    return ()
