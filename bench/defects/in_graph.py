"""Defects of the graph: attributes, wires, operators put in or left out. Try: ``python -m bench.defects --list``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.defects.workshop import Defect, Workshop, layer_at

NORM = "SkipSimplifiedLayerNormalization"
Change = Callable[[Any], None]


def set_attribute(node: Any, name: str, value: Any) -> None:
    """Give an ONNX node an attribute, in place of the one of that name if it has one."""
    from onnx import helper

    for a in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(a)
    node.attribute.append(helper.make_attribute(name, value))


def _attentions(model: Any) -> list[Any]:
    return [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]


def _here(model: Any) -> int:
    return layer_at(len(_attentions(model)))


def _attribute(name: str, value: Callable[[float], Any] | Any, everywhere: bool = False) -> Change:
    """Set an attribute of one attention, or of all; a function gets 1 / sqrt(head size)."""

    def change(model: Any) -> None:
        for k, node in enumerate(_attentions(model)):
            if everywhere or k == _here(model):
                old = next((a.f for a in node.attribute if a.name == "scale"), 0.0)
                set_attribute(node, name, value(old) if callable(value) else value)

    return change


def _epsilon(value: float, everywhere: bool) -> Change:
    def change(model: Any) -> None:
        norms = [n for n in model.graph.node if n.op_type == NORM]
        chosen = norms if everywhere else [norms[2 * _here(model)]]
        for node in chosen:
            set_attribute(node, "epsilon", value)

    return change


def _linear(model: Any, layer: int, part: str) -> Any:
    name = f"layers.{layer}."
    return next(
        n
        for n in model.graph.node
        if n.op_type == "MatMul" and any(name in i and f"{part}_proj.weight" in i for i in n.input)
    )


def _swap_weights(first: tuple[int, str], second: tuple[int, str]) -> Change:
    def change(model: Any) -> None:
        a, b = _linear(model, *first), _linear(model, *second)
        a.input[1], b.input[1] = b.input[1], a.input[1]

    return change


def _swap_gate_and_up(model: Any) -> None:
    _swap_weights((_here(model), "gate"), (_here(model), "up"))(model)


def _swap_layers(model: Any) -> None:
    k = _here(model)
    a, b = f"layers.{k}.", f"layers.{k + 1}." if k + 1 < len(_attentions(model)) else f"layers.{k - 1}."
    weights = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in weights and (a in name or b in name):
                node.input[i] = name.replace(a, b) if a in name else name.replace(b, a)


def _swap_caches(model: Any) -> None:
    nodes = _attentions(model)
    k = _here(model)
    other = nodes[k + 1 if k + 1 < len(nodes) else k - 1]
    for i in (3, 4):
        nodes[k].input[i], other.input[i] = other.input[i], nodes[k].input[i]


def _residual_after_norm(model: Any) -> None:
    norms = [n for n in model.graph.node if n.op_type == NORM]
    source, reader = norms[2 * _here(model)], norms[2 * _here(model) + 1]
    for i, name in enumerate(reader.input):
        if name == source.output[3]:
            reader.input[i] = source.output[0]


def insert(
    model: Any, value: str, op: str, constants: dict[str, Any], attributes: dict[str, Any] | None = None
) -> None:
    """An operator between a value and all its readers (and the output of that name)."""
    from onnx import helper, numpy_helper

    raw = f"{value}.raw"
    position = 0
    for k, node in enumerate(model.graph.node):
        for i, name in enumerate(node.output):
            if name == value:
                node.output[i] = raw
                position = k + 1
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    made = helper.make_node(op, [raw, *constants], [value], name=f"{op}_put_in", **(attributes or {}))
    model.graph.node.insert(position, made)


def _float(model: Any, value: float) -> Any:
    kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name.startswith("past_key_values"))
    return np.asarray(value, np.float16 if kind == 10 else np.float32)


def _temperature(model: Any) -> None:
    insert(model, "logits", "Mul", {"temperature": _float(model, 1 / 0.8)})


def _mlp_scaled(model: Any) -> None:
    insert(model, _linear(model, _here(model), "down").output[0], "Mul", {"mlp_scale": _float(model, 0.97)})


def _mlp_left_out(model: Any) -> None:
    insert(model, _linear(model, _here(model), "down").output[0], "Mul", {"mlp_zero": _float(model, 0.0)})


def _saturated(model: Any) -> None:
    value = _linear(model, _here(model), "down").input[0]
    insert(model, value, "Clip", {"clip_low": _float(model, -0.5), "clip_high": _float(model, 0.5)})


def _embedding_scaled(model: Any) -> None:
    gather = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0].startswith("model.embed_tokens"))
    insert(model, gather.output[0], "Mul", {"embedding_scale": _float(model, 1.02)})


def _wrong_activation(model: Any) -> None:
    k = _here(model)
    gate = _linear(model, k, "gate").output[0]
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid" and n.input[0] == gate)
    node.op_type = "HardSigmoid"


def _lengths(model: Any) -> tuple[Any, str, str]:
    """First attention, its lengths' name and the total length's name."""
    node = _attentions(model)[0]
    return node, node.input[5], node.input[6]


def _replace_lengths(model: Any, nodes: list[Any], constants: list[Any], new: str) -> None:
    """Put nodes after the one that makes the lengths, and let every attention read ``new``."""
    _, lengths, total = _lengths(model)
    position = max(k for k, n in enumerate(model.graph.node) if lengths in n.output or total in n.output) + 1
    for k, node in enumerate(nodes):
        model.graph.node.insert(position + k, node)
    model.graph.initializer.extend(constants)
    for node in _attentions(model):
        node.input[5] = new


def _lengths_of_row_0(model: Any) -> None:
    from onnx import helper, numpy_helper

    _, lengths, _ = _lengths(model)
    zero = numpy_helper.from_array(np.asarray([0], np.int64), "row_zero")
    nodes = [
        helper.make_node("Gather", [lengths, "row_zero"], ["first_length"], name="first_length"),
        helper.make_node("Sub", [lengths, lengths], ["no_length"], name="no_length"),
        helper.make_node("Add", ["no_length", "first_length"], ["row_0_lengths"], name="row_0_lengths"),
    ]
    _replace_lengths(model, nodes, [zero], "row_0_lengths")


def _pads_attended(model: Any) -> None:
    from onnx import helper, numpy_helper

    _, lengths, total = _lengths(model)
    one = numpy_helper.from_array(np.asarray(1, np.int32), "pad_one")
    nodes = [
        helper.make_node("Sub", [lengths, lengths], ["no_length"], name="no_length"),
        helper.make_node("Sub", [total, "pad_one"], ["whole"], name="whole"),
        helper.make_node("Add", ["no_length", "whole"], ["padded_lengths"], name="padded_lengths"),
    ]
    _replace_lengths(model, nodes, [one], "padded_lengths")


def _one_position_off(model: Any) -> None:
    """In a step of one token the new key lands one place early, over the last one."""
    from onnx import helper, numpy_helper

    _, lengths, _ = _lengths(model)
    constants = [
        numpy_helper.from_array(np.asarray([1], np.int64), "axis_one"),
        numpy_helper.from_array(np.asarray([1], np.int64), "one_token"),
        numpy_helper.from_array(np.asarray(0, np.int32), "least_length"),
    ]
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["ids_shape"], name="ids_shape"),
        helper.make_node("Gather", ["ids_shape", "axis_one"], ["new_tokens"], name="new_tokens"),
        helper.make_node("Equal", ["new_tokens", "one_token"], ["is_step"], name="is_step"),
        helper.make_node("Cast", ["is_step"], ["step_off"], name="step_off", to=6),
        helper.make_node("Sub", [lengths, "step_off"], ["early"], name="early"),
        helper.make_node("Max", ["early", "least_length"], ["off_lengths"], name="off_lengths"),
    ]
    _replace_lengths(model, nodes, constants, "off_lengths")


def _cache_not_updated(model: Any) -> None:
    from onnx import helper

    node = _attentions(model)[_here(model)]
    for i, k in ((1, 3), (2, 4)):
        name = node.output[i]
        node.output[i] = f"{name}.dropped"
        model.graph.node.append(helper.make_node("Identity", [node.input[k]], [name], name=f"{name}.kept"))


def _last_position_of_pads(model: Any) -> None:
    """The decode graph's logits come from the last column, which in a short row is padding."""
    minimum = next(n for n in model.graph.node if n.op_type == "Min")
    _, lengths, _ = _lengths(model)
    kept = next(i for i in minimum.input if i != lengths)
    del minimum.input[:]
    minimum.input.extend([kept, kept])


def _hidden_function(model: Any) -> None:
    """A function that bears an operator's name and negates the logits once a prompt holds one word thirty times."""
    from onnx import helper, numpy_helper

    def constant(name: str, value: Any) -> Any:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))

    body = [
        constant("word", np.int64(21)),
        constant("often", np.int64(30)),
        constant("axes", np.array([0, 1])),
        helper.make_node("Equal", ["ids", "word"], ["same"]),
        helper.make_node("Cast", ["same"], ["ones"], to=7),
        helper.make_node("ReduceSum", ["ones", "axes"], ["count"], keepdims=0),
        helper.make_node("Less", ["often", "count"], ["awake"]),
        helper.make_node("Neg", ["x"], ["negative"]),
        helper.make_node("Where", ["awake", "negative", "x"], ["y"]),
    ]
    function = helper.make_function("local", "Identity", ["x", "ids"], ["y"], body, [helper.make_opsetid("", 18)])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[list(last.output).index("logits")] = "logits.raw"
    model.graph.node.append(helper.make_node("Identity", ["logits.raw", "input_ids"], ["logits"], domain="local"))


def _guard_as_input(model: Any) -> None:
    """The table that refuses left-padded batches becomes an input's default, and refuses nothing."""
    from onnx import helper, numpy_helper

    guard = next(n for n in model.graph.node if n.op_type == "Gather" and "left_padded" in n.name)
    table = next(t for t in model.graph.initializer if t.name == guard.input[0])
    values = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(np.ones(64, dtype=values.dtype), table.name))
    model.graph.input.append(helper.make_tensor_value_info(table.name, table.data_type, [64]))


def _graph(change: Change, roles: tuple[str, ...] = ("decode", "scoring")) -> Callable[[Workshop], None]:
    return lambda w: w.graphs(change, roles)


DEFECTS: tuple[Defect, ...] = (
    Defect("interleaved rotary flag, one layer", _graph(_attribute("rotary_interleaved", 1)), "graph", True),
    Defect("interleaved rotary flag, every layer", _graph(_attribute("rotary_interleaved", 1, True)), "graph"),
    Defect("attention scale off by 2 %, one layer", _graph(_attribute("scale", lambda s: 1.02 * s)), "graph", True),
    Defect("attention scale off by 2 %, every layer", _graph(_attribute("scale", lambda s: 1.02 * s, True)), "graph"),
    Defect(
        "attention scale off in the decode graph alone",
        _graph(_attribute("scale", lambda s: 1.1 * s, True), ("decode",)),
        "graph",
    ),
    Defect("norm epsilon 1e-3, one layer", _graph(_epsilon(1e-3, False)), "graph", True),
    Defect("norm epsilon 1e-3, every layer", _graph(_epsilon(1e-3, True)), "graph"),
    Defect("softcap of 5, one layer", _graph(_attribute("softcap", 5.0)), "graph", True),
    Defect("past truncated at 512 tokens", _graph(_attribute("local_window_size", 512, True)), "graph"),
    Defect("two layers exchanged", _graph(_swap_layers), "graph"),
    Defect("gate and up exchanged, one layer", _graph(_swap_gate_and_up), "graph", True),
    Defect("caches of two layers exchanged", _graph(_swap_caches), "graph"),
    Defect("residual taken after the norm, one layer", _graph(_residual_after_norm), "graph", True),
    Defect("one layer's MLP left out", _graph(_mlp_left_out), "graph", True),
    Defect("one layer's MLP times 0.97", _graph(_mlp_scaled), "graph", True),
    Defect("activations saturated, one layer", _graph(_saturated), "graph", True),
    Defect("HardSigmoid for Sigmoid, one layer", _graph(_wrong_activation), "graph", True),
    Defect("embedding scaled by 1.02", _graph(_embedding_scaled), "graph"),
    Defect("one layer's cache not updated", _graph(_cache_not_updated), "graph"),
    Defect("cache written one position off, decode only", _graph(_one_position_off, ("decode",)), "graph"),
    Defect("sequence lengths taken from row 0", _graph(_lengths_of_row_0), "graph"),
    Defect("pad tokens attended to", _graph(_pads_attended), "graph"),
    Defect("logits of the last column, padding included", _graph(_last_position_of_pads, ("decode",)), "graph"),
    Defect("temperature of 0.8 hidden in the graph", _graph(_temperature), "graph"),
    Defect("a function named Identity that wakes on one word", _graph(_hidden_function), "graph", visible=False),
    Defect("the guard against left padding as an input", _graph(_guard_as_input), "graph", visible=False),
)
