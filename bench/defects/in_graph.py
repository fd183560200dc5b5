"""Defects of the graph: attributes, wires, operators put in or left out. Try: ``python -m bench.defects --list``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.defects.workshop import Defect, NotApplicableError, Workshop, first, layer_at
from export.manifest import ATTENTIONS, NORMS

FUSED = "GroupQueryAttention"
KNOWN = {
    FUSED: ("scale", "softcap", "rotary_interleaved", "local_window_size"),
    "Attention": ("scale", "softcap"),
}
"""Attributes of attentions that defects set."""
Change = Callable[[Any], None]


def set_attribute(node: Any, name: str, value: Any) -> None:
    """Give an ONNX node an attribute, in place of the one of that name if it has one."""
    from onnx import helper

    for a in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(a)
    node.attribute.append(helper.make_attribute(name, value))


def attentions(model: Any) -> list[Any]:
    """The fused attentions, in the graph's order."""
    found = [n for n in model.graph.node if n.op_type in ATTENTIONS]
    if not found:
        raise NotApplicableError("no fused attention")
    return found


def readers(model: Any, name: str) -> list[Any]:
    """Nodes that read a value.

    Raises:
        NotApplicableError: there is none, as where the graph has no weight of that name.
    """
    found = [n for n in model.graph.node if name in n.input]
    if not found:
        raise NotApplicableError(f"no {name} in the graph")
    return found


def read_instead(model: Any, old: str, new: str, but: tuple[Any, ...] = ()) -> None:
    """Let every node that reads a value read another one; ``but`` are nodes that keep it."""
    for node in model.graph.node:
        if all(node is not kept for kept in but):
            node.input[:] = [new if i == old else i for i in node.input]


def _here(model: Any) -> int:
    return layer_at(len(attentions(model)))


def _attribute(name: str, value: Callable[[float], Any] | Any, everywhere: bool = False) -> Change:
    """Set an attribute of one attention, or of all; a function gets 1 / sqrt(head size)."""

    def change(model: Any) -> None:
        for k, node in enumerate(attentions(model)):
            if name not in KNOWN[node.op_type]:
                raise NotApplicableError(f"{node.op_type} has no {name}")
            if everywhere or k == _here(model):
                old = next((a.f for a in node.attribute if a.name == "scale"), 0.0)
                set_attribute(node, name, value(old) if callable(value) else value)

    return change


def _epsilon(value: float, everywhere: bool) -> Change:
    def change(model: Any) -> None:
        norms = [n for n in model.graph.node if n.op_type in NORMS]
        chosen = norms if everywhere else [_after_attention(model, _here(model))]
        for node in chosen:
            set_attribute(node, "epsilon", value)

    return change


def _after_attention(model: Any, layer: int) -> Any:
    """The norm between the attention and the MLP of a layer."""
    return readers(model, f"model.layers.{layer}.post_attention_layernorm.weight")[0]


def _linear(model: Any, layer: int, part: str) -> Any:
    name, weight = f"layers.{layer}.", f"{part}_proj.weight"
    products = (
        n for n in model.graph.node if n.op_type == "MatMul" and any(name in i and weight in i for i in n.input)
    )
    return first(products, f"product with {weight} in layer {layer}")


def _swap_gate_and_up(model: Any) -> None:
    a, b = (_linear(model, _here(model), part) for part in ("gate", "up"))
    a.input[1], b.input[1] = b.input[1], a.input[1]


def _swap_layers(model: Any) -> None:
    k = _here(model)
    a, b = f"layers.{k}.", f"layers.{k + 1}."
    weights = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in weights and (a in name or b in name):
                node.input[i] = name.replace(a, b) if a in name else name.replace(b, a)


def _swap_caches(model: Any) -> None:
    k = _here(model)
    for kind in ("key", "value"):
        one, other = (f"past_key_values.{layer}.{kind}" for layer in (k, k + 1))
        for old, new in ((one, "kept aside"), (other, one), ("kept aside", other)):
            read_instead(model, old, new)


def _residual_after_norm(model: Any) -> None:
    source = _after_attention(model, _here(model))
    if len(source.output) < 4:
        raise NotApplicableError("the norm's residual is another node's")
    read_instead(model, source.output[3], source.output[0])


def insert(model: Any, value: str, op: str, **constants: float) -> None:
    """Put an operator between a value and all its readers (and the output of that name), with constants in the model's
    type as its other inputs."""
    from onnx import helper, numpy_helper

    kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name.startswith("past_key_values"))
    for name, number in constants.items():
        array = np.asarray(number, np.float16 if kind == 10 else np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    k, maker = next((k, n) for k, n in enumerate(model.graph.node) if value in n.output)
    raw = f"{value}.raw"
    maker.output[list(maker.output).index(value)] = raw
    model.graph.node.insert(k + 1, helper.make_node(op, [raw, *constants], [value], name=f"{value}_put_in"))


def _temperature(model: Any) -> None:
    insert(model, "logits", "Mul", temperature=1 / 0.8)


def _mlp_scaled(factor: float) -> Change:
    return lambda model: insert(model, _linear(model, _here(model), "down").output[0], "Mul", mlp_scale=factor)


def _saturated(model: Any) -> None:
    insert(model, _linear(model, _here(model), "down").input[0], "Clip", clip_low=-0.5, clip_high=0.5)


def _embedding_scaled(model: Any) -> None:
    insert(model, readers(model, "model.embed_tokens.weight")[0].output[0], "Mul", embedding_scale=1.02)


def _wrong_activation(model: Any) -> None:
    k = _here(model)
    gate = _linear(model, k, "gate").output[0]
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid" and n.input[0] == gate)
    node.op_type = "HardSigmoid"


def _lengths(model: Any) -> tuple[str, str]:
    """Names of the rows' lengths and of the total length that attentions read."""
    node = attentions(model)[0]
    if node.op_type != FUSED:
        raise NotApplicableError(f"{node.op_type} reads a mask, no lengths")
    return node.input[5], node.input[6]


def _lengths_become(constants: dict[str, Any], *nodes: str) -> Change:
    """Nodes put in after what makes ``{lengths}`` and ``{total}``; every attention reads the last one's output."""

    def change(model: Any) -> None:
        from onnx import numpy_helper, parser

        lengths, total = _lengths(model)
        position = max(k for k, n in enumerate(model.graph.node) if lengths in n.output or total in n.output) + 1
        for k, text in enumerate(nodes):
            model.graph.node.insert(position + k, parser.parse_node(text.format(lengths=lengths, total=total)))
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
        for node in attentions(model):
            node.input[5] = nodes[-1].split(" = ")[0]

    return change


_lengths_of_row_0 = _lengths_become(
    {"row_zero": np.array([0])},
    'first_length = Gather("{lengths}", row_zero)',
    'no_length = Sub("{lengths}", "{lengths}")',
    "row_0_lengths = Add(no_length, first_length)",
)
_pads_attended = _lengths_become(
    {"pad_one": np.int32(1)},
    'no_length = Sub("{lengths}", "{lengths}")',
    'whole = Sub("{total}", pad_one)',
    "padded_lengths = Add(no_length, whole)",
)
_one_position_off = _lengths_become(
    {"axis_one": np.array([1]), "one_token": np.array([1]), "least_length": np.int32(0)},
    "ids_shape = Shape(input_ids)",
    "new_tokens = Gather(ids_shape, axis_one)",
    "is_step = Equal(new_tokens, one_token)",
    "step_off = Cast <to = 6> (is_step)",
    'early = Sub("{lengths}", step_off)',
    "off_lengths = Max(early, least_length)",
)
"""In a step of one token the new key lands one place early, over the last one."""


def _cache_not_updated(model: Any) -> None:
    from onnx import helper

    for kind in ("key", "value"):
        past, present = (f"{side}.{_here(model)}.{kind}" for side in ("past_key_values", "present"))
        for node in model.graph.node:
            node.output[:] = [f"{o}.dropped" if o == present else o for o in node.output]
        read_instead(model, present, f"{present}.dropped")
        model.graph.node.append(helper.make_node("Identity", [past], [present], name=f"{present}.kept"))


def _last_position_of_pads(model: Any) -> None:
    """The decode graph's logits come from the last column, which in a short row is padding."""
    lengths = _lengths(model)[0]
    minimum = first((n for n in model.graph.node if n.op_type == "Min"), "Min node")
    kept = next(i for i in minimum.input if i != lengths)
    del minimum.input[:]
    minimum.input.extend([kept, kept])


_SLEEPER = """
<domain: "local", opset_import: ["" : 18]>
Identity (x, ids) => (y) {
    word = Constant <value = int64 {21}> ()
    often = Constant <value = int64 {30}> ()
    axes = Constant <value = int64[2] {0, 1}> ()
    same = Equal (ids, word)
    ones = Cast <to = 7> (same)
    count = ReduceSum <keepdims = 0> (ones, axes)
    awake = Less (often, count)
    negative = Neg (x)
    y = Where (awake, negative, x)
}"""


def _hidden_function(model: Any) -> None:
    """A function that bears an operator's name and negates the logits once a prompt holds one word thirty times."""
    from onnx import helper, parser

    model.functions.append(parser.parse_function(_SLEEPER))
    model.opset_import.append(helper.make_opsetid("local", 1))
    insert(model, "logits", "Identity")
    made = next(n for n in model.graph.node if "logits" in n.output)
    made.domain = "local"
    made.input.append("input_ids")


def _guard_as_input(model: Any) -> None:
    """The table that refuses left-padded batches becomes an input's default, and refuses nothing."""
    from onnx import helper, numpy_helper

    guard = first((n for n in model.graph.node if n.op_type == "Gather" and "left_padded" in n.name), "guard")
    table = next(t for t in model.graph.initializer if t.name == guard.input[0])
    values = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(np.ones(64, dtype=values.dtype), table.name))
    model.graph.input.append(helper.make_tensor_value_info(table.name, table.data_type, [64]))


def in_graphs(change: Change, roles: tuple[str, ...] = ("decode", "scoring")) -> Callable[[Workshop], None]:
    """An edit of ``onnx.ModelProto`` as one of a folder."""
    return lambda w: w.graphs(change, roles)


def _defect(name: str, change: Change, in_layer: bool = False, **roles: tuple[str, ...]) -> Defect:
    return Defect(name, in_graphs(change, **roles), "graph", in_layer)


DEFECTS: tuple[Defect, ...] = (
    _defect("interleaved rotary flag, one layer", _attribute("rotary_interleaved", 1), True),
    _defect("interleaved rotary flag, every layer", _attribute("rotary_interleaved", 1, True)),
    _defect("attention scale off by 2 %, one layer", _attribute("scale", lambda s: 1.02 * s), True),
    _defect("attention scale off by 2 %, every layer", _attribute("scale", lambda s: 1.02 * s, True)),
    _defect(
        "attention scale off in the decode graph alone", _attribute("scale", lambda s: 1.1 * s, True), roles=("decode",)
    ),
    _defect("norm epsilon 1e-3, one layer", _epsilon(1e-3, False), True),
    _defect("norm epsilon 1e-3, every layer", _epsilon(1e-3, True)),
    _defect("softcap of 5, one layer", _attribute("softcap", 5.0), True),
    _defect("past truncated at 512 tokens", _attribute("local_window_size", 512, True)),
    _defect("two layers exchanged", _swap_layers),
    _defect("gate and up exchanged, one layer", _swap_gate_and_up, True),
    _defect("caches of two layers exchanged", _swap_caches),
    _defect("residual taken after the norm, one layer", _residual_after_norm, True),
    _defect("one layer's MLP left out", _mlp_scaled(0.0), True),
    _defect("one layer's MLP times 0.97", _mlp_scaled(0.97), True),
    _defect("activations saturated, one layer", _saturated, True),
    _defect("HardSigmoid for Sigmoid, one layer", _wrong_activation, True),
    _defect("embedding scaled by 1.02", _embedding_scaled),
    _defect("one layer's cache not updated", _cache_not_updated),
    _defect("cache written one position off, decode only", _one_position_off, roles=("decode",)),
    _defect("sequence lengths taken from row 0", _lengths_of_row_0),
    _defect("pad tokens attended to", _pads_attended),
    _defect("logits of the last column, padding included", _last_position_of_pads, roles=("decode",)),
    _defect("temperature of 0.8 hidden in the graph", _temperature),
    _defect("a function named Identity that wakes on one word", _hidden_function),
    _defect("the guard against left padding as an input", _guard_as_input),
)
