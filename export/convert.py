"""Specification -> ONNX: trace a skeleton without weights, then point its initialisers at streamed data.

The skeleton lives on PyTorch's ``meta`` device except for one number per parameter, so a 70B model traces in the
memory of a small one. Marker operators become ``MatMul`` (and ``Add`` for biases); every weight becomes an
initialiser with an external-data location that :mod:`export.weights` fills. For int8 and int4 the marker becomes
``MatMulNBits`` over codes, scales and zero points of one weight, or, with standard operators, ``DequantizeLinear`` and
``MatMul``.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from export.architectures import architecture_of
from export.architectures.base import Windows
from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.fused import MARKER_DOMAIN, MS, FusedOnnxConfig
from export.manifest import ONNX_TYPE, Weight, first_line
from export.oldest_runtime import ir_version_of
from export.sizes import head_dim_of
from export.spec import BITS, ExportSpec

OPSET = {"GroupQueryAttention": 18, "Attention": 24}
"""Opset of the graph by its attention. The TorchScript exporter ends at 18 and lets newer operators through."""
_TRACE_OPSET = 18
IR_VERSION = {"GroupQueryAttention": 8, "Attention": 11}
EMBEDDING = "model.embed_tokens.weight"
ROPE = ("model.rope_cos", "model.rope_sin")
BLOCKS = "input_blocks"
GUARD = "left_padded_batch_refused__pad_on_the_right"
CACHE_LENGTH = 4096
"""Most slots of a static cache, unless asked for more: the attention of every step reads all of them."""
ALIGNMENT = 4096
"""ONNX Runtime maps external data into memory only at page boundaries."""

ONNX_DTYPE = {**ONNX_TYPE, "uint8": int(TensorProto.UINT8)}
ONNX_DTYPE |= {"int8": int(TensorProto.INT8), "int4": int(TensorProto.INT4)}
TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "uint8": torch.uint8}


@dataclass(frozen=True)
class Conversion:
    """Both graphs (they share one data file), the recipes of their weights and the rotary tables."""

    decode: onnx.ModelProto
    scoring: onnx.ModelProto
    recipes: tuple[Weight, ...]
    rope: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    data_bytes: int


def rope_tables(config: PretrainedConfig) -> dict[str, Tensor]:
    """Cosine and sine tables ``[context, head_dim / 2]`` in fp32, as transformers' own rotary module computes them."""
    rotary = architecture_of(config).rotary(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    tables = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = head_dim_of(config) // 2
    return {name: table[0, :, :half].contiguous() for name, table in zip(ROPE, tables, strict=True)}


def _number(value: int, dtype: torch.dtype) -> Tensor:
    """The value-th of many different positive numbers, ``[1]``. As integers, bf16 would run out of them at 256."""
    if dtype.itemsize == 4:
        return torch.full((1,), value, dtype=dtype)
    return torch.tensor([0x3F80 + value], dtype=torch.int16).view(dtype)  # finite up to 15,000 in bf16 and fp16


def _meta_model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The model without storage, its head tied if the configuration says so."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as e:  # whatever its classes stumble over
            raise BrokenCheckpointError(
                f"config.json: transformers cannot build this model ({type(e).__name__}: {first_line(e)}); is a "
                "setting missing, or null?"
            ) from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, in layer order; a tied head is the embedding's."""
    return {name: tuple(p.shape) for name, p in _meta_model(config, torch.float32).named_parameters()}


def cache_length_of(config: PretrainedConfig, spec: ExportSpec) -> int:
    """Slots of a row in the cache of the standard operators' graph.

    Raises:
        UnsupportedModelError: more than the model's context.
    """
    length = spec.cache_length or min(CACHE_LENGTH, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"--cache-length {length} exceeds the model's context of {config.max_position_embeddings} tokens"
        )
    return length


def kept_windows(config: PretrainedConfig, spec: ExportSpec) -> Windows:
    """The manifest's ``kv.windows``."""
    return architecture_of(config).windows(config) if spec.window_cache else ()


def _rope_shape(config: PretrainedConfig) -> tuple[int, int]:
    return config.max_position_embeddings, head_dim_of(config) // 2


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The model as it is traced, with one number of storage per parameter.

    The exporter merges parameters of equal value, so each gets a value of its own; and it writes every parameter out,
    so matrices are one number in shape as well: markers carry the size of their output. Of the embedding one row is
    left, which the trace's token 0 looks up.
    """
    model = _meta_model(config, dtype)
    value = 0
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                value += 1
                shape = parameter.shape
                if isinstance(module, nn.Embedding):
                    shape = (1, shape[1])
                    module.padding_idx = None  # that row is gone
                elif len(shape) == 2:
                    shape = (1, 1)
                replaced[id(parameter)] = nn.Parameter(_number(value, dtype).expand(shape), requires_grad=False)
            module._parameters[name] = replaced[id(parameter)]
    for i, name in enumerate(ROPE):
        table = torch.full((1,), -1.0 - i, dtype=dtype).expand(_rope_shape(config))
        model.model.register_buffer(name.removeprefix("model."), table)
    model.model.rotary_emb._buffers.clear()
    return model.eval()


def _trace(config: PretrainedConfig, spec: ExportSpec, last_logits: bool) -> onnx.ModelProto:
    dtype, attention = TORCH_DTYPE[spec.float_type], spec.attention
    onnx_config = FusedOnnxConfig(config, task="text-generation", use_past=True, use_past_in_inputs=True)
    onnx_config.last_logits = last_logits
    onnx_config.attention = attention
    onnx_config.window_cache = spec.window_cache
    onnx_config.guarded = spec.provider == "any"  # CUDA has no ArgMax over integers
    model = _skeleton(config, dtype)
    standard = attention == "Attention"
    length = cache_length_of(config, spec) if standard else 1
    onnx_config.cache_length = length
    kv = (1, config.num_key_value_heads, length, head_dim_of(config))
    zero = torch.zeros(1, dtype=dtype)
    past = [(zero.expand(kv), zero.expand(kv)) for _ in range(config.num_hidden_layers)]
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros((1, 2), dtype=torch.int64),
        "attention_mask": torch.ones((1, length if standard else 3), dtype=torch.int64),
    }
    if standard:
        inputs["position_ids"] = torch.ones((1, 2), dtype=torch.int64)
        inputs["write_indices"] = torch.ones(1, dtype=torch.int64)
    inputs["past_key_values"] = past
    axes = {**onnx_config.inputs, **onnx_config.outputs}
    buffer = io.BytesIO()
    with onnx_config.patch_model_for_export(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter's deprecation and tracer notes
        torch.onnx.export(
            model,
            (),
            buffer,  # type: ignore[arg-type]
            kwargs=inputs,
            input_names=list(onnx_config.inputs),
            output_names=list(onnx_config.outputs),
            dynamic_axes=axes,
            opset_version=_TRACE_OPSET,
            export_params=False,
            do_constant_folding=False,
            custom_opsets={MARKER_DOMAIN: 1} | ({MS: 1} if attention == "GroupQueryAttention" else {}),
            dynamo=False,
        )
    traced = onnx.load_model_from_string(buffer.getvalue())
    for present in traced.graph.output[1:] if standard else ():
        present.type.tensor_type.shape.dim[2].dim_value = length
    return traced


class _Weights:
    """Collects recipes, one per distinct initialiser, and hands out aligned offsets."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], spec: ExportSpec, layers: int) -> None:
        self.shapes = shapes
        self.layers = layers
        self.spec = spec
        self.recipes: dict[str, Weight] = {}
        self.end = 0

    def add(
        self,
        name: str,
        sources: tuple[str, ...],
        transform: str,
        shape: tuple[int, ...],
        dtype: str | None = None,
        bits: int = 0,
    ) -> str:
        if name not in self.recipes:
            dtype = dtype or self.spec.float_type
            width = BITS[dtype] if dtype in BITS else 8 * TORCH_DTYPE[dtype].itemsize
            nbytes = -(-math.prod(shape) * width // 8)
            offset = -(-self.end // ALIGNMENT) * ALIGNMENT
            self.recipes[name] = Weight(name, sources, transform, shape, dtype, offset, nbytes, bits)
            self.end = offset + nbytes
        return name

    def linear(self, sources: tuple[str, ...], name: str) -> str:
        rows = sum(self.shapes[s][0] for s in sources)
        transform = "transpose" if len(sources) == 1 else "concat_transpose"
        return self.add(name, sources, transform, (self.shapes[sources[0]][1], rows))

    def quantised(self, sources: tuple[str, ...], name: str, bits: int, looked_up: bool = False) -> list[str]:
        """Codes, scales and, but for symmetric ones, zero points; neighbours in the file.

        The codes are in MatMulNBits' layout, whose last block is filled up; ``looked_up``: in GatherBlockQuantized's,
        ``[rows, columns]``, which gives out what it holds; with standard operators in DequantizeLinear's.
        """
        rows, columns = sum(self.shapes[s][0] for s in sources), self.shapes[sources[0]][1]
        block = self.spec.block
        blocks = -(-columns // block)
        if self.spec.standard:
            if columns % block:  # TensorRT has no shorter last block; it may take the codes and read other blocks
                raise UnsupportedModelError(
                    f"--block-size {block} does not divide the {columns} inputs of {name}, and TensorRT takes whole "
                    f"blocks only; pass one that does, or leave that part in floats (--keep-float, --lm-head float)"
                )
            return [
                self.add(f"{name}.codes", sources, "codes_transposed", (columns, rows), f"int{bits}", bits),
                self.add(f"{name}.scales", sources, "scales_transposed", (blocks, rows), bits=bits),
            ]
        parts: dict[str, tuple[tuple[int, ...], str | None]] = {
            "codes": ((rows, columns) if looked_up else (rows, blocks, block * bits // 8), "uint8"),
            "scales": ((rows, blocks), None),
        }
        if self.spec.float_zero(bits) and columns % block == 0:
            # (q - z) s = (q - 8) s + (8 - z) s: the second part multiplies the sums of the input's blocks. MatMulNBits
            # itself takes real zero points too, but has no fast kernel for them (30 times slower on the CPU).
            parts["offsets"] = ((blocks, rows), None)
        elif self.spec.float_zero(bits):
            parts["zero_points"] = ((rows, blocks), None)
        elif not self.spec.symmetric:
            parts["zero_points"] = ((rows, -(-blocks * bits // 8)), "uint8")
        return [self.add(f"{name}.{part}", sources, part, shape, dtype, bits) for part, (shape, dtype) in parts.items()]


def _joined_name(sources: tuple[str, ...]) -> str:
    """``...self_attn.{q,k,v}_proj.weight`` -> ``...self_attn.qkv_proj.weight``; a single source keeps its name."""
    if len(sources) == 1:
        return sources[0]
    prefix, _, _ = sources[0].rpartition(".q_proj")
    return f"{prefix}.qkv_proj.{sources[0].rpartition('.')[2]}"


def _linear_nodes(
    x: str, out: str, sources: tuple[str, ...], biases: tuple[str, ...], weights: _Weights, sums: dict[str, str]
) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes of one linear layer and the initialisers that they read; ``sums``: block sums so far, by input."""
    spec = weights.spec
    name = _joined_name(sources)
    # A tied head reads the transpose of what the embedding gathers: a copy under its own name.
    name = "lm_head.weight" if name == EMBEDDING else name
    label = name.removesuffix(".weight")
    product = out if not biases else f"{label}.product"
    bits = spec.bits_of(name, weights.layers)

    def node(op: str, inputs: list[str], output: str, part: str = "", **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=f"{label}{part}.{op}", **attributes)

    if bits is None:
        used = [weights.linear(sources, name)]
        nodes = [node("MatMul", [x, *used], product)]
    elif spec.standard:
        used = weights.quantised(sources, name, bits)
        values = f"{label}.dequantised"
        nodes = [
            node("DequantizeLinear", used, values, axis=0, block_size=spec.block),
            node("MatMul", [x, values], product),
        ]
    else:
        used = weights.quantised(sources, name, bits)
        offsets = next((n for n in used if weights.recipes[n].transform == "offsets"), None)
        nodes = [
            node(
                "MatMulNBits",
                [x, *used[:2]] if offsets else [x, *used],
                f"{label}.codes_product" if offsets else product,
                domain=MS,
                K=weights.shapes[sources[0]][1],
                N=weights.recipes[used[0]].shape[0],
                bits=bits,
                block_size=spec.block,
                accuracy_level=spec.accuracy_level or 0,
            )
        ]
        if offsets:
            if x not in sums:
                sums[x] = f"{label}.block_sums"
                nodes.append(node("Reshape", [x, f"{BLOCKS}.{spec.block}"], f"{label}.blocks"))
                nodes.append(node("ReduceSum", [f"{label}.blocks", f"{BLOCKS}.axis"], sums[x], keepdims=0))
            nodes.append(node("MatMul", [sums[x], offsets], f"{label}.offset", ".offsets"))
            nodes.append(node("Add", [f"{label}.codes_product", f"{label}.offset"], product, ".offsets"))
    if biases:
        shape = (sum(weights.shapes[b][0] for b in biases),)
        bias = weights.add(_joined_name(biases), biases, "copy" if len(biases) == 1 else "concat", shape)
        nodes.append(node("Add", [bias, product], out))
        used.append(bias)
    return nodes, used


def _embedding_node(node: onnx.NodeProto, weights: _Weights) -> tuple[onnx.NodeProto, list[str]]:
    """The embedding's Gather over 8-bit rows."""
    used = weights.quantised((EMBEDDING,), EMBEDDING, 8, looked_up=True)
    made = helper.make_node(
        "GatherBlockQuantized",
        [used[0], node.input[1], *used[1:]],
        list(node.output),
        name=f"{EMBEDDING}.GatherBlockQuantized",
        domain=MS,
        bits=8,
        block_size=weights.spec.block,
        gather_axis=0,
        quantize_axis=1,
    )
    return made, used


def _fp32_logits(graph: onnx.GraphProto) -> None:
    """bf16 has no numpy type and fits no comparison: the head's output leaves the graph as fp32."""
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == "logits":
                node.output[i] = "logits.bf16"
    graph.node.append(helper.make_node("Cast", ["logits.bf16"], ["logits"], name="logits.Cast", to=TensorProto.FLOAT))
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def _initialiser(recipe: Weight, data_file: str) -> TensorProto:
    """An initialiser whose data lie in the external-data file."""
    tensor = TensorProto(name=recipe.name, data_type=ONNX_DTYPE[recipe.dtype], dims=recipe.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_file), ("offset", recipe.offset), ("length", recipe.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _lower(model: onnx.ModelProto, weights: _Weights, data_file: str) -> onnx.ModelProto:
    """Markers -> MatMul or MatMulNBits, parameter inputs -> external initialisers, dead nodes and value infos away."""
    graph = model.graph
    spec = weights.spec
    real_inputs = [i for i in graph.input if not i.name.startswith(("model.", "lm_head."))]
    parameters = {i.name for i in graph.input} - {i.name for i in real_inputs}
    used: list[str] = []
    nodes: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []
    sums: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            constants.append(tensor)
        elif node.domain == MARKER_DOMAIN:
            n = next(a.i for a in node.attribute if a.name == "n_weights")
            sources, biases = tuple(node.input[1 : 1 + n]), tuple(node.input[1 + n :])
            made, read_here = _linear_nodes(node.input[0], node.output[0], sources, biases, weights, sums)
            nodes += made
            used += read_here
        elif node.op_type == "Gather" and node.input[0] == EMBEDDING and spec.embedding == "int8":
            gather, read_here = _embedding_node(node, weights)
            nodes.append(gather)
            used += read_here
        else:
            nodes.append(node)
            used.extend(i for i in node.input if i in parameters)
    for name in used:
        if name not in weights.recipes:
            transform, source = ("rope", ()) if name in ROPE else ("copy", (name,))
            weights.add(name, source, transform, weights.shapes[name])

    if sums:
        shape = helper.make_tensor(f"{BLOCKS}.{spec.block}", TensorProto.INT64, [4], [0, 0, -1, spec.block])
        constants += [shape, helper.make_tensor(f"{BLOCKS}.axis", TensorProto.INT64, [1], [-1])]
    first_valid = {node.output[0] for node in nodes if node.op_type == "ArgMax"}
    for node in nodes:
        if node.op_type == "Gather" and node.input[1] in first_valid:
            node.name = GUARD  # ONNX Runtime's error names the node
    # Optional outputs that nothing reads (mean, inverse std) get the empty name.
    read = {i for node in nodes for i in node.input} | {o.name for o in graph.output}
    for node in nodes:
        for i, output in enumerate(node.output):
            if output and output not in read:
                node.output[i] = ""
    initialisers = [_initialiser(weights.recipes[name], data_file) for name in dict.fromkeys(used)]
    del graph.node[:], graph.initializer[:], graph.input[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initialisers + constants)
    graph.input.extend(real_inputs)
    if spec.float_type == "bf16":
        _fp32_logits(graph)
    domains = {node.domain for node in graph.node} | {""}
    del model.opset_import[:]
    for domain in sorted(domains):
        model.opset_import.append(helper.make_opsetid(domain, 1 if domain else OPSET[spec.attention]))
    model.ir_version = ir_version_of(model, IR_VERSION[spec.attention])
    graph.name = "llama"
    return model


def convert(config: PretrainedConfig, spec: ExportSpec, data_file: str) -> Conversion:
    """Build both graphs of a decoder without reading a single weight.

    Args:
        config: the checkpoint's configuration.
        spec: precision, target and quantisation.
        data_file: name of the external-data file that both graphs will point at.

    Raises:
        UnsupportedModelError, BrokenCheckpointError: see :class:`export.architectures.base.Architecture`.
    """
    architecture = architecture_of(config)
    architecture.require(config)
    if spec.window_cache and architecture.attention_window(config) is None:
        raise UnsupportedModelError(
            "--window-cache: no layer of this model has an attention window shorter than its context"
        )
    shapes = parameter_shapes(config)
    architecture.require_tensors(shapes)
    shapes |= dict.fromkeys(ROPE, _rope_shape(config))
    if spec.precision in BITS and not any(
        spec.bits_of(name, config.num_hidden_layers) for name in shapes if name.endswith("_proj.weight")
    ):
        raise UnsupportedModelError(
            f"--keep-float {spec.keep_float} leaves none of {config.num_hidden_layers} layers to quantise; "
            f"pass --keep-float none"
        )
    weights = _Weights(shapes, spec, config.num_hidden_layers)
    decode = _lower(_trace(config, spec, last_logits=True), weights, data_file)
    scoring = _lower(_trace(config, spec, last_logits=False), weights, data_file)
    decode.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1  # a reader without a manifest sees it
    return Conversion(decode, scoring, tuple(weights.recipes.values()), rope_tables(config), shapes, weights.end)
