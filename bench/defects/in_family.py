"""Defects of what only some architectures have: attention windows, QKV biases, QK norm.

Try: ``python -m bench.defects --list``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.defects.in_graph import FUSED, attentions, read_instead, readers, set_attribute
from bench.defects.workshop import Defect, NotApplicableError, Workshop, first, layer_at, usual_layer
from bench.gate.tensors import TensorReader
from export.manifest import NORMS

Edit = Callable[[Any, int], None]
"""Of an ``onnx.ModelProto``, in a layer."""
HEADS = ("q", "k")
WINDOW = "local_window_size"


# -- attention windows -----------------------------------------------------------------------------------------------


def windows_of(w: Workshop) -> tuple[int | None, ...]:
    """The attention window of each layer."""
    from export.architectures import architecture_of

    return architecture_of(w.config).windows(w.config)


def _layer(w: Workshop, windowed: bool) -> int:
    """The layer that defects of windows sit in: one that has a window, or none in a model where others have one."""
    windows = windows_of(w)
    if not any(windows):
        raise NotApplicableError("no layer has an attention window")
    found = [k for k, window in enumerate(windows) if bool(window) == windowed]
    usual = layer_at(len(windows))
    return int(first([*(k for k in found if k >= usual), *found[::-1]], "layer without an attention window"))


def windowed(w: Workshop) -> int:
    """A layer that has a window."""
    return _layer(w, True)


def unwindowed(w: Workshop) -> int:
    """A layer that has none, in a model where others have one."""
    return _layer(w, False)


def _mask(model: Any) -> dict[str, Any]:
    """The nodes that put a window into a mask, by operator: Sub (the window less 1), GreaterOrEqual, And, Where."""
    made = {o: n for n in model.graph.node for o in n.output}
    nodes: dict[str, Any] = {}
    compare = first((n for n in model.graph.node if n.op_type == "GreaterOrEqual"), "window in a mask")
    nodes["GreaterOrEqual"], nodes["Sub"] = compare, made[compare.input[1]]
    nodes["And"] = readers(model, compare.output[0])[0]
    nodes["Where"] = readers(model, nodes["And"].output[0])[0]
    return nodes


def give_window(model: Any, layer: int, window: int | None) -> None:
    """Let one layer attend to so many tokens, None: to all."""
    from onnx import helper, numpy_helper

    node = attentions(model)[layer]
    if node.op_type == FUSED:
        set_attribute(node, WINDOW, -1 if window is None else window)
        return
    mask, own = _mask(model), f"window_of_{layer}"
    start, compared = mask["GreaterOrEqual"].input[0], mask["Sub"].input[0]
    causal = next(i for i in mask["And"].input if i != mask["GreaterOrEqual"].output[0])
    if window is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(window - 1), f"{own}.less_1"))
        model.graph.node.extend(
            [
                helper.make_node("Sub", [compared, f"{own}.less_1"], [f"{own}.first"], name=f"{own}.Sub"),
                helper.make_node("GreaterOrEqual", [start, f"{own}.first"], [f"{own}.near"], name=f"{own}.Greater"),
                helper.make_node("And", [causal, f"{own}.near"], [f"{own}.seen"], name=f"{own}.And"),
            ]
        )
    seen = causal if window is None else f"{own}.seen"
    where = helper.make_node("Where", [seen, *mask["Where"].input[1:]], [own], name=f"{own}.Where")
    model.graph.node.append(where)
    node.input[3] = own


def _all_windows(change: Callable[[int], int], only_mask: bool = False) -> Callable[[Workshop], None]:
    """Every window of the model by another one, in the attribute or in the mask."""

    def edit(model: Any) -> None:
        from onnx import numpy_helper

        if attentions(model)[0].op_type != FUSED:
            (name,) = (i for i in _mask(model)["Sub"].input if any(i == t.name for t in model.graph.initializer))
            tensor = first((t for t in model.graph.initializer if t.name == name), name)
            window = int(numpy_helper.to_array(tensor)) + 1
            tensor.CopyFrom(numpy_helper.from_array(np.array(change(window) - 1), name))
            return
        if only_mask:
            raise NotApplicableError("windows are attributes here, not in a mask")
        for attribute in (a for n in attentions(model) for a in n.attribute if a.name == WINDOW):
            attribute.i = change(attribute.i)

    def on(w: Workshop) -> None:
        windowed(w)
        w.graphs(edit)

    return on


def _window(change: Callable[[int], int | None]) -> Callable[[Workshop], None]:
    """Another window in one of the layers that have one."""

    def on(w: Workshop) -> None:
        layer = windowed(w)
        window = windows_of(w)[layer]
        assert window is not None
        w.graphs(lambda model: give_window(model, layer, change(window)))

    return on


def _window_of_others(w: Workshop) -> None:
    layer, window = unwindowed(w), next(x for x in windows_of(w) if x)
    w.graphs(lambda model: give_window(model, layer, window))


# -- biases ----------------------------------------------------------------------------------------------------------


def _bias(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.qkv_proj.bias"


def _bias_zeroed(w: Workshop) -> None:
    with w.weight(_bias(usual_layer(w))) as bias:
        bias[:] = 0


def _biases_exchanged(w: Workshop) -> None:
    """The key's bias at the place of the query's first heads, and the other way round."""
    size = w.manifest.kv.head_dim
    queries, keys = w.config.num_attention_heads * size, w.config.num_key_value_heads * size
    with w.weight(_bias(usual_layer(w))) as bias:
        q, k = bias[:keys], bias[queries : queries + keys]
        q[:], k[:] = k.copy(), q.copy()


def _bias_of_another_layer(w: Workshop) -> None:
    one, other = (_bias(usual_layer(w) + k) for k in range(2))

    def change(model: Any) -> None:
        readers(model, one)
        read_instead(model, one, other)

    w.graphs(change)


# -- QK norm ---------------------------------------------------------------------------------------------------------


def _head_norm(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}_norm.weight"


def _norm_weights_exchanged(w: Workshop) -> None:
    q, k = (_head_norm(usual_layer(w), part) for part in HEADS)
    with w.weight(q) as one, w.weight(k) as other:
        one[:], other[:] = other.copy(), one.copy()


def _head_norms(
    edit: Callable[[Any, Any, Workshop], None], parts: tuple[str, ...] = HEADS
) -> Callable[[Workshop], None]:
    """``edit`` gets a graph and a norm of single heads in it."""

    def on(w: Workshop) -> None:
        def change(model: Any) -> None:
            for part in parts:
                edit(model, readers(model, _head_norm(usual_layer(w), part))[0], w)

        w.graphs(change)

    return on


def _left_out(model: Any, norm: Any, _: Workshop) -> None:
    read_instead(model, norm.output[0], norm.input[0])


def _other_epsilon(_model: Any, norm: Any, _: Workshop) -> None:
    set_attribute(norm, "epsilon", 1e-3)


def _whole_projection(model: Any, norm: Any, w: Workshop) -> None:
    """Normalised over all heads at once, each with the same weights."""
    from onnx import numpy_helper

    reshape = next(n for n in model.graph.node if norm.input[0] in n.output)
    sizes = next(t for t in model.graph.initializer if t.name == reshape.input[1])
    weight = next(t for t in model.graph.initializer if t.name == norm.input[1])
    heads = int(numpy_helper.to_array(sizes)[-2])
    tiled = np.tile(TensorReader(w.folder).read(weight), heads)
    model.graph.initializer.append(numpy_helper.from_array(tiled, f"{weight.name}.tiled"))
    read_instead(model, norm.output[0], reshape.output[0])
    norm.input[:] = [reshape.input[0], f"{weight.name}.tiled"]
    reshape.input[0] = norm.output[0]


_POSITIONS = (
    "ids_shape = Shape(input_ids)",
    "new_64 = Gather(ids_shape, axis_one)",
    "new_32 = Cast <to = 6> (new_64)",
    'length = Add("{lengths}", one_32)',
    "before = Sub(length, new_32)",
    "past_32 = Max(before, no_32)",
    "past = Cast <to = 7> (past_32)",
    "column = Unsqueeze(past, axes_one)",
    "row = Range(zero_64, new_64, one_64)",
    "positions = Add(column, row)",
)
"""Of the new tokens, from what GroupQueryAttention is told."""


def _after_rotary(w: Workshop) -> None:
    """Queries and keys normalised after they are rotated."""
    w.graphs(lambda model: _rotate_first(model, usual_layer(w)))


def _rotate_first(model: Any, layer: int) -> None:
    from onnx import helper, numpy_helper, parser

    norms = [readers(model, _head_norm(layer, part))[0] for part in HEADS]
    attention = attentions(model)[layer]
    if attention.op_type != FUSED:
        for norm in norms:
            transpose = readers(model, norm.output[0])[0]
            rotary = readers(model, transpose.output[0])[0]
            transpose.input[0] = norm.input[0]
            read_instead(model, rotary.output[0], norm.output[0])
            norm.input[0] = rotary.output[0]
        return
    small = {"axis_one": np.array(1), "one_32": np.int32(1), "no_32": np.int32(0), "axes_one": np.array([1])}
    small |= {"zero_64": np.array(0), "one_64": np.array(1)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in small.items())
    model.graph.node.extend(parser.parse_node(text.format(lengths=attention.input[5])) for text in _POSITIONS)
    for part, norm in zip(HEADS, norms, strict=True):
        split = next(n for n in model.graph.node if norm.input[0] in n.output)  # a Reshape: head by head
        flat = readers(model, norm.output[0])[0]
        own = f"{part}_rotated"
        inputs = [split.input[0], "positions", *attention.input[7:9]]
        model.graph.node.extend(
            [
                helper.make_node("RotaryEmbedding", inputs, [own], name=own, domain="com.microsoft"),
                helper.make_node("Reshape", [own, split.input[1]], [f"{own}.heads"], name=f"{own}.Reshape"),
            ]
        )
        norm.input[0] = f"{own}.heads"
        assert flat.output[0] in attention.input
    set_attribute(attention, "do_rotary", 0)
    del attention.input[7:]


# -- harmless ones ---------------------------------------------------------------------------------------------------


def window_of_the_context(w: Workshop) -> None:
    """Layers without a window get one as large as the context."""
    layers = [k for k, window in enumerate(windows_of(w)) if not window]
    if not layers:
        raise NotApplicableError("every layer has an attention window")

    def change(model: Any) -> None:
        if attentions(model)[0].op_type != FUSED:
            raise NotApplicableError("windows are no attributes here")
        for layer in layers:
            give_window(model, layer, w.manifest.context_length)

    w.graphs(change)


def mask_of_each_layer(w: Workshop) -> None:
    """Each windowed layer computes its mask anew."""
    windowed(w)

    def change(model: Any) -> None:
        if attentions(model)[0].op_type == FUSED:
            raise NotApplicableError("windows are attributes here, not in a mask")
        for layer, window in enumerate(windows_of(w)):
            if window:
                give_window(model, layer, window)

    w.graphs(change)


def bias_first(w: Workshop) -> None:
    """The two sides of each addition of a bias exchanged."""

    def change(model: Any) -> None:
        adds = [n for n in model.graph.node if n.op_type == "Add" and any(i.endswith("_proj.bias") for i in n.input)]
        first(adds, "bias")
        for node in adds:
            node.input[:] = node.input[::-1]

    w.graphs(change)


def defaults_left_out(model: Any) -> None:
    """Norms without the attributes that are their defaults."""
    for node in model.graph.node:
        if node.op_type in NORMS:
            for a in [a for a in node.attribute if a.name in ("axis", "stash_type")]:
                node.attribute.remove(a)


DEFECTS: tuple[Defect, ...] = (
    Defect("attention window one token longer, one layer", _window(lambda n: n + 1), "graph", True, layer=windowed),
    Defect("attention window one token shorter, one layer", _window(lambda n: n - 1), "graph", True, layer=windowed),
    Defect("attention window missing, one layer", _window(lambda _: None), "graph", True, layer=windowed),
    Defect("attention window in a layer that has none", _window_of_others, "graph", True, layer=unwindowed),
    Defect("attention windows twice as long, every layer", _all_windows(lambda n: 2 * n), "graph"),
    Defect("the mask's window one token shorter", _all_windows(lambda n: n - 1, only_mask=True), "graph"),
    Defect("bias of QKV zeroed, one layer", _bias_zeroed, "weights", True),
    Defect("biases of queries and keys exchanged, one layer", _biases_exchanged, "weights", True),
    Defect("bias of QKV of another layer", _bias_of_another_layer, "graph", True),
    Defect("norm weights of queries and keys exchanged, one layer", _norm_weights_exchanged, "weights", True),
    Defect("norms of heads left out, one layer", _head_norms(_left_out), "graph", True),
    Defect("epsilon of a head norm 1e-3, one layer", _head_norms(_other_epsilon, ("q",)), "graph", True),
    Defect("norms of heads after rotary embedding, one layer", _after_rotary, "graph", True),
    Defect("norms over the whole projection, one layer", _head_norms(_whole_projection), "graph", True),
)
