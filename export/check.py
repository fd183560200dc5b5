"""Facts of the exported graph against what the configuration demands.

A fused export is worth nothing if one attention was not fused, so every count is checked and a difference fails
the export. Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

from collections import Counter

import onnx
from transformers import PretrainedConfig

from export.errors import GraphCheckError
from export.manifest import ATTENTIONS, NORMS
from export.sizes import head_dim_of
from export.spec import ExportSpec
from export.tensorrt_ops import check_standard

FORBIDDEN = (
    "Softmax",
    "Sin",
    "Cos",
    "Neg",
    "Range",
    "Where",
    "Trilu",
    "Pow",
    "ReduceMean",
    "Sqrt",
    "LayerNormalization",
)
"""Operators that only an unfused attention, rotary embedding or norm leaves behind."""

NODE_BUDGET = {"GroupQueryAttention": (11, 20), "Attention": (26, 40)}
"""Most nodes: for each layer, and besides."""


def expected_counts(config: PretrainedConfig, spec: ExportSpec) -> dict[str, int]:
    """Operators that a LLaMA of this configuration must have in that form, by operator type."""
    layers = config.num_hidden_layers
    heads = config.num_attention_heads * head_dim_of(config)
    columns = {"o": heads, "down": config.intermediate_size}
    linear = [
        (f"model.layers.{i}.x.{part}_proj.weight", columns.get(part, config.hidden_size))
        for i in range(layers)
        for part in ("qkv", "o", "gate", "up", "down")
    ]
    linear.append(("lm_head.weight", config.hidden_size))
    bits = [(spec.bits_of(name, layers), k) for name, k in linear]
    quantised = sum(b is not None for b, _ in bits)
    offsets = sum(b is not None and spec.float_zero(b) and k % spec.block == 0 for b, k in bits)
    if spec.standard:
        counts = {"MatMul": len(bits), "DequantizeLinear": quantised}
    else:
        counts = {"MatMul": len(bits) - quantised + offsets, "MatMulNBits": quantised}
    if spec.embedding != "float":
        counts["GatherBlockQuantized"] = 1
    if spec.attention == "Attention":
        own = {"Attention": layers, "RMSNormalization": 2 * layers + 1}
        own |= dict.fromkeys(("RotaryEmbedding", "TensorScatter"), 2 * layers)
    else:
        own = {
            "GroupQueryAttention": layers,
            "SimplifiedLayerNormalization": 1,
            "SkipSimplifiedLayerNormalization": 2 * layers,
        }
    return {op: n for op, n in {**own, **counts}.items() if n}


def check_graph(model: onnx.ModelProto, config: PretrainedConfig, spec: ExportSpec) -> dict[str, int]:
    """Count and compare; also reads the attributes of each attention and norm.

    Returns:
        The counts of :func:`expected_counts`, as found.

    Raises:
        GraphCheckError: names every difference at once.
    """
    found = Counter(node.op_type for node in model.graph.node)
    expected = expected_counts(config, spec)
    wrong = [f"{found[op]} {op} where the config demands {n}" for op, n in expected.items() if found[op] != n]
    standard = spec.attention == "Attention"
    if standard:
        wrong += check_standard(model)
    forbidden = set(FORBIDDEN) - ({"Range", "Where"} if standard else set())
    forbidden |= {"MatMul", "MatMulNBits"} - set(expected)
    wrong += [f"{found[op]} {op} left over" for op in sorted(forbidden) if found[op]]
    biases = 2 * config.num_hidden_layers * bool(getattr(config, "attention_bias", False))
    biases += 3 * config.num_hidden_layers * bool(getattr(config, "mlp_bias", False))
    per_layer, fixed = NODE_BUDGET[spec.attention]
    per_layer += 18 * (spec.zero_points == "float")
    fixed += 4 * (spec.lm_head == "int4") + (spec.float_type == "bf16") + expected.get("DequantizeLinear", 0)
    budget = per_layer * config.num_hidden_layers + fixed + biases
    if len(model.graph.node) > budget:
        wrong.append(f"{len(model.graph.node)} nodes where {budget} are enough")
    scale = head_dim_of(config) ** -0.5
    for node in model.graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "GroupQueryAttention":
            wanted = {
                "num_heads": config.num_attention_heads,
                "kv_num_heads": config.num_key_value_heads,
                "do_rotary": 1,
                "rotary_interleaved": 0,
            }
            wrong += [f"{node.name}: {k} is {values.get(k)}, not {v}" for k, v in wanted.items() if values.get(k) != v]
        if node.op_type in ATTENTIONS and abs(values.get("scale", 0.0) - scale) > 1e-6 * scale:
            wrong.append(f"{node.name}: scale is {values.get('scale')}, not {scale}")
        if node.op_type in NORMS:
            eps = values.get("epsilon", 0.0)
            if abs(eps - config.rms_norm_eps) > 1e-6 * config.rms_norm_eps:
                wrong.append(f"{node.name}: epsilon is {eps}, not {config.rms_norm_eps}")
    if wrong:
        raise GraphCheckError("the exported graph is not the model: " + "; ".join(wrong))
    return {op: found[op] for op in expected}
