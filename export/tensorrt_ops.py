"""What TensorRT's ONNX parser takes, as far as a LLaMA needs it: a check that runs without TensorRT.

It speaks for the published operator list of TensorRT 10.15's parser, which that of 11.2 repeats for these operators
(docs/tensorrt-operators.md has both, and what TensorRT-RTX 1.7 said when it was asked): operators, types, and the
restrictions that a legal ONNX graph may break. It does not say that an engine builds: the gate's check
``tensorrt_compile`` does, with TensorRT-RTX's compiler.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

PARSER_VERSION = "10.15"
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
CODES = frozenset({TensorProto.INT8, TensorProto.INT4})
_ANY = FLOATS | {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
_NUMBERS = FLOATS | {TensorProto.INT32, TensorProto.INT64}
ALLOWED: dict[str, frozenset[int]] = {
    "Add": _NUMBERS,
    "And": frozenset({TensorProto.BOOL}),
    "Attention": FLOATS,
    "Cast": _ANY,
    "Concat": _ANY,
    "DequantizeLinear": CODES,
    "Gather": _ANY,
    "GatherND": _ANY,
    "GreaterOrEqual": _NUMBERS,
    "LessOrEqual": _NUMBERS,
    "MatMul": FLOATS,
    "Mul": _NUMBERS,
    "RMSNormalization": FLOATS,
    "Range": _NUMBERS - {TensorProto.FLOAT16, TensorProto.BFLOAT16},
    "ReduceMax": _NUMBERS,
    "Reshape": _ANY,
    "RotaryEmbedding": FLOATS,
    "Shape": _ANY,
    "Sigmoid": FLOATS,
    "Slice": _ANY,
    "Split": _ANY,
    "Squeeze": _ANY,
    "Sub": _NUMBERS,
    "TensorScatter": FLOATS,
    "Transpose": _ANY,
    "Unsqueeze": _ANY,
    "Where": _ANY,
}
"""Operators, each with the types that its first float, integer or boolean input may have."""
CONSTANT_INPUTS = {"DequantizeLinear": (0, 1), "ReduceMax": (1,), "Slice": (3,), "Split": (1,)}
CONSTANT_INPUTS |= {"Squeeze": (1,), "Unsqueeze": (1,)}
"""Inputs (by position) that the parser wants as initialisers: axes, split sizes, codes and scales."""
OPSET = 24


def check_standard(model: onnx.ModelProto) -> list[str]:
    """What keeps TensorRT's parser of :data:`PARSER_VERSION` from taking the graph; empty when nothing does."""
    wrong = [
        f"operator set {o.domain or 'ai.onnx'} {o.version}, the parser takes ai.onnx up to {OPSET}"
        for o in model.opset_import
        if o.domain not in ("", "ai.onnx") or o.version > OPSET
    ]
    constants = {t.name for t in model.graph.initializer}
    inputs = {v.name: v.type.tensor_type for v in model.graph.input}
    outputs = {v.name for v in model.graph.output}
    types = {t.name: t.data_type for t in model.graph.initializer}
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.value_info]}
    for tensor in model.graph.initializer:
        if tensor.data_type not in _ANY | CODES:
            wrong.append(f"{tensor.name}: type {TensorProto.DataType.Name(tensor.data_type)}")
    for node in model.graph.node:
        name = node.name or node.op_type
        if node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED:
            wrong.append(f"{name}: operator {node.domain or 'ai.onnx'}::{node.op_type} is not on the list")
            continue
        for i in CONSTANT_INPUTS.get(node.op_type, ()):
            if len(node.input) > i and node.input[i] and node.input[i] not in constants:
                wrong.append(f"{name}: input {i} of {node.op_type} must be a constant")
        known = types.get(node.input[0]) if node.input else None
        if known is not None and known not in ALLOWED[node.op_type]:
            wrong.append(f"{name}: {node.op_type} over {TensorProto.DataType.Name(known)}")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Attention":
            if len([o for o in node.output if o]) != 1:
                wrong.append(f"{name}: Attention may have one output only")
            if any(node.input[4:6]):
                wrong.append(f"{name}: Attention may not take past keys and values")
            if any(node.input[6:]):
                wrong.append(
                    f"{name}: Attention's nonpad_kv_seqlen is ignored without an error; the mask has to say it"
                )
            if any(node.input[3:4]) and attributes.get("is_causal"):
                wrong.append(f"{name}: Attention takes a mask or is_causal, not both")
            if attributes.get("softcap"):
                wrong.append(f"{name}: Attention may not have a softcap")
        if node.op_type == "DequantizeLinear":
            if any(node.input[2:]):
                wrong.append(f"{name}: DequantizeLinear may not have a zero point")
            codes, scales = (sizes.get(i) or (0,) for i in node.input[:2])
            if codes[0] != scales[0] * attributes.get("block_size", 0):
                wrong.append(f"{name}: DequantizeLinear has to have whole blocks along axis 0")
        if node.op_type == "TensorScatter":
            cache = inputs.get(node.input[0])
            if cache is None or not all(name in outputs for name in node.output):
                wrong.append(f"{name}: TensorScatter has to lead from an input of the graph to an output")
            elif not cache.shape.dim[2].dim_value:
                wrong.append(f"{name}: the length of {node.input[0]} has to be static")
            if attributes.get("mode", b"linear") != b"linear" or attributes.get("axis", -2) not in (-2, 2):
                wrong.append(f"{name}: TensorScatter has to be linear along axis 2")
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            wrong.append(f"{name}: has a subgraph")
    return wrong
