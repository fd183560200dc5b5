"""Facts of the exported graph against what the configuration demands.

A fused export is worth nothing if one attention was not fused, so every count is checked and a difference fails
the export. Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

from collections import Counter

import onnx
from transformers import PretrainedConfig

from export.architectures import architecture_of
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
HEAD_NORM_NODES = {"GroupQueryAttention": 9, "Attention": 2}
"""More of them in a layer whose queries and keys have a QK norm: norms, and what splits QKV for them."""
WINDOW_NODES = 12
"""More of them for the mask of an attention window."""


def norms_of(config: PretrainedConfig) -> int:
    """Norms of a decoder, the last one included."""
    return len(architecture_of(config).layer_norms) * int(config.num_hidden_layers) + 1


def expected_counts(config: PretrainedConfig, spec: ExportSpec) -> dict[str, int]:
    """Operators that a decoder of this configuration must have in that form, by operator type."""
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
        own = {"Attention": layers, "RMSNormalization": norms_of(config)}
        own |= dict.fromkeys(("RotaryEmbedding", "TensorScatter"), 2 * layers)
    else:
        own = {
            "GroupQueryAttention": layers,
            "SimplifiedLayerNormalization": norms_of(config) - 2 * layers,
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
    architecture = architecture_of(config)
    found = Counter(node.op_type for node in model.graph.node)
    expected = expected_counts(config, spec)
    wrong = [f"{found[op]} {op} where the config demands {n}" for op, n in expected.items() if found[op] != n]
    standard = spec.attention == "Attention"
    if standard:
        wrong += check_standard(model)
    forbidden = set(FORBIDDEN) - ({"Range", "Where"} if standard else set())
    forbidden |= {"MatMul", "MatMulNBits"} - set(expected)
    wrong += [f"{found[op]} {op} left over" for op in sorted(forbidden) if found[op]]
    biases = sum(node.op_type == "Add" and node.input[0].endswith("_proj.bias") for node in model.graph.node)
    per_layer, fixed = NODE_BUDGET[spec.attention]
    if architecture.head_norms:
        per_layer += HEAD_NORM_NODES[spec.attention]
    fixed += WINDOW_NODES * (standard and architecture.attention_window(config) is not None)
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
    wrong += _windows(model, config, spec)
    if wrong:
        raise GraphCheckError("the exported graph is not the model: " + "; ".join(wrong))
    return {op: found[op] for op in expected}


def _windows(model: onnx.ModelProto, config: PretrainedConfig, spec: ExportSpec) -> list[str]:
    """What is wrong with the attention windows, layer by layer; of standard operators, with the mask's one."""
    architecture = architecture_of(config)
    wanted = [w or -1 for w in architecture.windows(config)]
    if spec.standard:
        constants = {t.name: t for t in model.graph.initializer}
        less = [
            onnx.numpy_helper.to_array(constants[n.input[1]]) for n in _mask_starts(model) if n.input[1] in constants
        ]
        have = sorted({int(x) + 1 for x in less})
        window = architecture.attention_window(config)
        one = [window] if window else []
        return [f"the mask's attention windows are {have}, not {one}"] if have != one else []
    nodes = [
        {a.name: a.i for a in node.attribute} for node in model.graph.node if node.op_type == "GroupQueryAttention"
    ]
    found = [n.get("local_window_size", -1) for n in nodes]
    wrong = [f"the layers' attention windows are {found}, not {wanted}"] if found != wanted else []
    decode = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1
    keeps = [int(decode and spec.window_cache and w > 0) for w in wanted]
    have = [n.get("sliding_window_cache", 0) for n in nodes]
    return wrong + ([f"sliding_window_cache of the layers is {have}, not {keeps}"] if have != keeps else [])


def _mask_starts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that compute the first slot of a window: what GreaterOrEqual compares slots with."""
    made = {name: node for node in model.graph.node for name in node.output}
    compared = [n.input[1] for n in model.graph.node if n.op_type == "GreaterOrEqual"]
    return [made[name] for name in compared if name in made and made[name].op_type == "Sub"]
