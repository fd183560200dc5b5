"""Facts of the exported graph against what the configuration demands.

A fused export is worth nothing if one attention was not fused, so every count is checked and a difference fails
the export. Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

from collections import Counter

import onnx
from transformers import PretrainedConfig

from export.convert import head_dim_of
from export.errors import GraphCheckError

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

NODE_BUDGET_PER_LAYER = 11
NODE_BUDGET_FIXED = 20


def expected_counts(config: PretrainedConfig) -> dict[str, int]:
    """Fused operators that a LLaMA of this configuration must have, by operator type."""
    layers = config.num_hidden_layers
    return {
        "GroupQueryAttention": layers,
        "SimplifiedLayerNormalization": 1,
        "SkipSimplifiedLayerNormalization": 2 * layers,
        "MatMul": 5 * layers + 1,
    }


def check_graph(model: onnx.ModelProto, config: PretrainedConfig) -> dict[str, int]:
    """Count and compare; also reads the attributes of each attention and norm.

    Returns:
        The counts of :func:`expected_counts`, as found.

    Raises:
        GraphCheckError: names every difference at once.
    """
    found = Counter(node.op_type for node in model.graph.node)
    wrong = [
        f"{found[op]} {op} where the config demands {n}" for op, n in expected_counts(config).items() if found[op] != n
    ]
    wrong += [f"{found[op]} {op} left over" for op in FORBIDDEN if found[op]]
    biases = 2 * config.num_hidden_layers * bool(getattr(config, "attention_bias", False))
    biases += 3 * config.num_hidden_layers * bool(getattr(config, "mlp_bias", False))
    budget = NODE_BUDGET_PER_LAYER * config.num_hidden_layers + NODE_BUDGET_FIXED + biases
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
            if abs(values.get("scale", 0.0) - scale) > 1e-6 * scale:
                wrong.append(f"{node.name}: scale is {values.get('scale')}, not {scale}")
        if node.op_type.endswith("SimplifiedLayerNormalization"):
            eps = values.get("epsilon", 0.0)
            if abs(eps - config.rms_norm_eps) > 1e-6 * config.rms_norm_eps:
                wrong.append(f"{node.name}: epsilon is {eps}, not {config.rms_norm_eps}")
    if wrong:
        raise GraphCheckError("the exported graph is not the model: " + "; ".join(wrong))
    return {op: found[op] for op in expected_counts(config)}
