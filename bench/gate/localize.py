"""Where a folder leaves the baseline: the first layer, then the operator inside it.

A copy of the scoring graph gets its inner values as outputs; PyTorch's come from hooks. Both run the same ids. What
rounding does to each value is measured, not guessed: PyTorch in the folder's own precision (fp32: another attention
kernel) against PyTorch in fp32. The first of qkv, attention, o_proj, mlp and residual, layer by layer, that is off by
several times as much names the place.
Try: ``llama-onnx validate BAD_FOLDER --baseline demo``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gate.subject import Subject
from export.manifest import NORMS
from reports.validation import Place

FLOOR = {"fp32": 1e-6, "fp16": 4e-4, "bf16": 3e-3}
"""Relative error that always counts as rounding: a null control can be equal by chance."""
GROWTH = 2.0
"""How many times what went in may come out of a right operator, in fp32, before :data:`STEP` counts.

A softmax makes rounding grow, and the null control, another attention kernel over equal products, does not show it.
"""
SHORT_SUM = 64
"""Terms of a dot product up to which fp32's floor holds; beyond, rounding grows with the root of their number."""
QUANTISED = {"int8": 0.03, "int4": 0.15}
STEP = 4.0
"""A value is out of line when its error is this many times what PyTorch's own is at that place."""
OPERATORS = ("qkv", "attention", "o_proj", "mlp")
TITLES = {
    "qkv": "the input norm or the QKV projection",
    "attention": "attention (rotary embedding, scale, mask, cache)",
    "o_proj": "the output projection",
    "mlp": "the MLP or the norm in front of it",
    "output": "the residual after the MLP",
    "embedding": "the embedding",
    "head": "the last norm or the head",
}


def localize(s: Subject) -> Place | None:
    """The first place at which the folder leaves the baseline, None where one pass over a text shows none.

    Raises:
        ValueError: a graph without fused attention, whose layers cannot be told apart.
    """
    ids = (s.windows[0] if s.windows else list(range(1, 33)))[:96]
    s.close()  # the copy that shows its inner values packs all weights once more
    ours = _inner_values(s, ids)
    theirs = s.baseline.residuals(ids)
    kind = s.terms.null_kind
    null = s.baseline.null_residuals(kind, ids)
    floor = QUANTISED.get(s.manifest.precision, FLOOR[s.manifest.activations])
    growth = 0.0  # in a short type the control rounds as the folder does
    if kind == "eager":
        config, growth = s.baseline.config, GROWTH
        floor *= max(1.0, max(config.hidden_size, config.intermediate_size) / SHORT_SUM) ** 0.5
    layers = len(theirs)
    before = 0.0

    def place(layer: int, operator: str, gap: float, noise: float) -> Place | None:
        if gap <= STEP * max(noise, floor, growth * before):
            return None
        where = {-1: "the embedding", layers: "after the last layer"}.get(layer, f"layer {layer}")
        title = "" if layer == -1 else f", {TITLES[operator]}"
        detail = f"{where}{title}: relative error {gap:.2g} where {before:.2g} went in"
        return Place(layer=layer, operator=operator, deviation=gap, before=before, detail=detail)

    first = _gap(ours["input.0"], theirs[0]["input"])
    if found := place(-1, "embedding", first, 0.0):
        return found
    for k in range(layers):
        values = [(n, f"{n}.{k}", theirs[k][n], null[k][n]) for n in OPERATORS]
        if k + 1 < layers:
            values.append(("output", f"input.{k + 1}", theirs[k + 1]["input"], null[k + 1]["input"]))
        for operator, name, wanted, other in values:
            if name not in ours:
                continue
            gap = _gap(ours[name], wanted)
            if found := place(k, operator, gap, _gap(other, wanted)):
                return found
            before = max(before, gap)
    wanted = s.baseline.score(ids)
    gap = _gap(ours["logits"].astype(np.float32), wanted)
    return place(layers, "head", gap, _gap(s.baseline.null_score(kind, ids), wanted))


def _gap(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Largest relative error over the tokens, by norm: a single wrong row must not drown in the others."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float((np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)).max())


def _inner_values(s: Subject, ids: list[int]) -> dict[str, NDArray[Any]]:
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(s.graph("scoring"))
    names = inner_names(model)
    have = {o.name for o in model.graph.output}
    kind = {"fp32": 1, "fp16": 10, "bf16": 16}[s.manifest.activations]
    for value in dict.fromkeys(names.values()):
        if value not in have:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, kind, None))
    with tempfile.TemporaryDirectory() as work:
        for path in s.folder.iterdir():
            if path.is_file():
                link_or_copy(path.resolve(), Path(work) / path.name)
        graph = Path(work) / "inner.onnx"
        onnx.save_model(model, graph)
        # the CPU where a fallback was allowed
        with closing(s.deployment.probe(graph, s.manifest, str(s.session.get("provider", "")))) as probe:
            found = probe.run(ids, None, ["logits", *dict.fromkeys(names.values())])
    return {"logits": found["logits"][0]} | {k: found[v][0] for k, v in names.items()}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it: ONNX Runtime refuses data that a symbolic one points to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def inner_names(model: Any) -> dict[str, str]:
    """Value names of ``input.N``, ``qkv.N``, ``attention.N``, ``o_proj.N`` and ``mlp.N`` in a fused graph.

    Found by walking from each attention, in the order of the cache that it writes.

    Raises:
        ValueError: no fused attention over packed QKV in the graph.
    """
    nodes = list(model.graph.node)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made = {name: node for node in nodes for name in node.output if name}
    attentions = [n for n in nodes if n.op_type in ("GroupQueryAttention", "Attention")]
    if not attentions:
        raise ValueError("the graph has no fused attention: its layers cannot be told apart")
    # Topological order, not the cache's: two layers that were exchanged must not look in order.
    names: dict[str, str] = {}
    for k, node in enumerate(attentions):
        standard = node.op_type == "Attention"
        packed, out = node.input[0], node.output[0]
        if standard or node.input[1]:
            packed = _packed(packed, made)
        if standard:
            out = _flat(out, readers)
        names[f"qkv.{k}"], names[f"attention.{k}"] = packed, out
        source = made.get(packed)
        while source is not None and source.op_type not in NORMS:
            source = next((made[i] for i in source.input if i in made), None)
        if source is not None:
            total = source.output[3] if source.op_type.startswith("Skip") and len(source.output) > 3 else ""
            names[f"input.{k}"] = total or source.input[0]
            if k and source.op_type.startswith("Skip"):
                names[f"mlp.{k - 1}"] = source.input[0]
        product = next((r for r in readers.get(out, []) if r.op_type in ("MatMul", "MatMulNBits")), None)
        if product is not None:
            value = product.output[0]
            names[f"o_proj.{k}"] = _biased(value, readers, made) if standard else _before_norm(value, readers)
    last = next((n for n in reversed(nodes) if n.op_type in NORMS), None)
    if last is not None and last.op_type.startswith("Skip"):
        names[f"mlp.{len(attentions) - 1}"] = last.input[0]
    return names


def _packed(value: str, made: dict[str, Any]) -> str:
    """The packed QKV that the query of an attention was split from."""
    between = ("RotaryEmbedding", "Transpose", "Reshape", "SimplifiedLayerNormalization", "RMSNormalization")
    while (node := made.get(value)) is not None and node.op_type in between:
        value = node.input[0]
    if node is not None and node.op_type == "Split":
        return str(node.input[0])
    raise ValueError("an Attention over no packed QKV: its layers cannot be told apart")


def _flat(value: str, readers: dict[str, list[Any]]) -> str:
    """An Attention's output ``[batch, heads, new, size]`` as the output projection reads it."""
    while following := [r for r in readers.get(value, []) if r.op_type in ("Transpose", "Reshape")]:
        value = following[0].output[0]
    return value


def _biased(value: str, readers: dict[str, list[Any]], made: dict[str, Any]) -> str:
    """The value itself, or after its bias; the residual is another addition."""
    following = readers.get(value, [])
    bias = next((r for r in following if r.op_type == "Add" and any(i not in made for i in r.input)), None)
    return bias.output[0] if bias is not None else value


def _before_norm(value: str, readers: dict[str, list[Any]]) -> str:
    """The value itself, or after the additions (bias, zero points) that stand between it and the next norm."""
    for _ in range(3):
        following = readers.get(value, [])
        addition = next((r for r in following if r.op_type == "Add"), None)
        if addition is None or any(r.op_type in NORMS for r in following):
            break
        value = addition.output[0]
    return value
