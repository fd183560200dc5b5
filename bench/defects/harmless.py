"""Changes that alter nothing a user could notice: the gate has to let every one pass.

Try: ``python -m bench.defects --list``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.defects.in_family import bias_first, defaults_left_out, mask_of_each_layer, window_of_the_context
from bench.defects.in_graph import attentions, in_graphs, insert, set_attribute
from bench.defects.workshop import NUMPY, Harmless, Workshop
from bench.gate.tensors import TensorReader


@contextmanager
def _session_options(**settings: Any) -> Iterator[None]:
    """Sessions of the runtime with other options than its own."""
    from runtime import ort_session

    ort: Any = vars(ort_session)["ort"]  # the runtime owns onnxruntime; here only its options are changed
    opened = ort.InferenceSession

    def changed(model: Any, sess_options: Any, **more: Any) -> Any:
        for name, value in settings.items():
            setattr(sess_options, name, value)
        return opened(model, sess_options, **more)

    with patch.object(ort, "InferenceSession", changed):
        yield


def _basic_optimisation() -> Any:
    from runtime import ort_session

    return _session_options(graph_optimization_level=vars(ort_session)["ort"].GraphOptimizationLevel.ORT_ENABLE_BASIC)


def _newer_opset(model: Any) -> None:
    for o in model.opset_import:
        if not o.domain:
            o.version += 1


def _node_order(model: Any) -> None:
    """Another topological order, drawn at random."""
    rng = np.random.default_rng(3)
    nodes = list(model.graph.node)
    made = {name: k for k, n in enumerate(nodes) for name in n.output if name}
    sorter = TopologicalSorter({k: {made[i] for i in n.input if i in made} for k, n in enumerate(nodes)})
    sorter.prepare()
    del model.graph.node[:]
    ready: list[int] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        k = ready.pop(int(rng.integers(len(ready))))
        model.graph.node.append(nodes[k])
        sorter.done(k)


def _names(model: Any) -> None:
    """Other names for nodes, inner values and initialisers; inputs and outputs keep theirs."""
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {""}
    new: dict[str, str] = {}

    def renamed(name: str) -> str:
        return name if name in kept else new.setdefault(name, f"v{len(new)}")

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for k, node in enumerate(graph.node):
        node.name = f"n{k}"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed(name)
    del graph.value_info[:]


def _data_layout(w: Workshop) -> None:
    """The weights in the opposite order, at other offsets, in a file of another name."""
    m = w.manifest
    old, name = w.folder / m.data_file, "weights.bin"
    places: dict[tuple[int, int], int] = {}
    with old.open("rb") as source, (w.folder / name).open("wb") as target:
        for weight in sorted(m.weights, key=lambda x: -x.offset):
            target.write(bytes(-target.tell() % 64))
            places[weight.offset, weight.nbytes] = target.tell()
            source.seek(weight.offset)
            target.write(source.read(weight.nbytes))

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.external_data:
                place = {e.key: e.value for e in tensor.external_data}
                new = places[int(place["offset"]), int(place["length"])]
                del tensor.external_data[:]
                for key, value in (("location", name), ("offset", new), ("length", place["length"])):
                    tensor.external_data.add(key=key, value=str(value))

    w.graphs(change)
    old.unlink()

    def describe(raw: dict[str, Any]) -> None:
        raw["data_file"] = name
        for weight in raw["weights"]:
            weight["offset"] = places[weight["offset"], weight["nbytes"]]

    w.json("manifest.json", describe)


def _small_inside(w: Workshop) -> None:
    """Norm weights stored in the graph itself."""
    from onnx import numpy_helper

    names = {x.name for x in w.manifest.weights if "norm" in x.name and x.dtype in NUMPY}
    read = TensorReader(w.folder).read

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.name in names:
                tensor.CopyFrom(numpy_helper.from_array(read(tensor), tensor.name))

    w.graphs(change)


def _all_logits(w: Workshop) -> None:
    """One graph for both purposes, with logits of every position."""

    def change(raw: dict[str, Any]) -> None:
        raw["files"].pop(raw["decode_graph"], None)
        (w.folder / raw["decode_graph"]).unlink()
        raw.update(decode_graph=raw["scoring_graph"], decode_logits="all")

    name = w.manifest.scoring_graph
    w.json("manifest.json", change)
    w.json("genai_config.json", lambda raw: raw["model"]["decoder"].update(filename=name))


def _other_numerics(w: Workshop) -> None:
    """Rotary tables one unit in the last place off here and there, as another PyTorch's sine gives them."""
    rng = np.random.default_rng(9)
    for name in ("model.rope_cos", "model.rope_sin"):
        with w.weight(name) as table:
            some = rng.random(table.shape) < 0.1
            table[some] = np.nextafter(table[some], table.dtype.type(0))


def _tokenizer_again(w: Workshop) -> None:
    """tokenizer.json without indents, merges in their older form."""
    path = w.own("tokenizer.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    merges = raw["model"].get("merges")
    if merges and isinstance(merges[0], list):
        raw["model"]["merges"] = [" ".join(pair) for pair in merges]
    path.write_text(json.dumps(raw), encoding="utf-8")


def _identities(model: Any) -> None:
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.output[0] != "logits"][:4]
    for value in [n.output[0] for n in products]:
        insert(model, value, "Identity")


def _notes(w: Workshop) -> None:
    def change(model: Any) -> None:
        model.producer_name, model.producer_version, model.doc_string = "another tool", "9.9", "hello"
        for node in model.graph.node:
            node.doc_string = "a note"

    w.graphs(change)
    (w.folder / "README.md").write_text("About this model.\n", encoding="utf-8")


def _constants_as_nodes(model: Any) -> None:
    """Small constants by ``Constant`` nodes, whole numbers in their short form."""
    from onnx import helper, numpy_helper

    for tensor in [t for t in model.graph.initializer if not t.external_data]:
        value = numpy_helper.to_array(tensor)
        model.graph.initializer.remove(tensor)
        short = {"value_int": int(value)} if value.ndim == 0 else {"value_ints": value.tolist()}
        form = short if value.dtype == np.int64 and value.ndim < 2 else {"value": tensor}
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], **form))


def _defaults_written(model: Any) -> None:
    """Attributes that are what they are anyway, as ONNX Runtime's optimiser writes them when it saves a graph."""
    for node in attentions(model):
        for name, value in (("causal", 1), ("smooth_softmax", -1), ("qk_output", 0), ("k_quant_type", "NONE")):
            set_attribute(node, name, value)


def _silu_in_one(model: Any) -> None:
    """SiLU as ONNX Runtime's optimiser saves it."""
    from onnx import helper

    nodes = list(model.graph.node)
    made = {name: node for node in nodes for name in node.output}
    for product in [n for n in nodes if n.op_type == "Mul"]:
        sigmoid = made.get(product.input[1])
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.input[0] == product.input[0]:
            one = helper.make_node(
                "QuickGelu", [product.input[0]], [product.output[0]], domain="com.microsoft", alpha=1.0
            )
            product.CopyFrom(one)
            model.graph.node.remove(sigmoid)


def _reshaped_once(model: Any) -> None:
    """A Reshape and an Unsqueeze as one Reshape, as onnx-simplifier writes it."""
    from onnx import helper, numpy_helper

    made = {name: node for node in model.graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer if not t.external_data}
    for node in [n for n in model.graph.node if n.op_type == "Unsqueeze"]:
        before = made.get(node.input[0])
        if before is not None and before.op_type == "Reshape" and {before.input[1], node.input[1]} <= constants.keys():
            sizes = constants[before.input[1]]
            for place in constants[node.input[1]]:
                sizes = [*sizes[:place], 1, *sizes[place:]]
            shape = f"{node.output[0]}.sizes"
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(sizes, np.int64), shape))
            node.CopyFrom(helper.make_node("Reshape", [before.input[0], shape], list(node.output), name=node.name))


def _settings_again(w: Workshop) -> None:
    """config.json and generation_config.json as transformers saves them."""
    from transformers import AutoConfig, GenerationConfig

    for kind, name in ((AutoConfig, "config.json"), (GenerationConfig, "generation_config.json")):
        if (w.folder / name).is_file():
            settings = kind.from_pretrained(w.checkpoint)
            w.own(name).unlink()
            settings.save_pretrained(w.folder)


def _template_comment(w: Workshop) -> None:
    w.template(lambda text: "{#- a comment -#}" + text)


HARMLESS: tuple[Harmless, ...] = (
    Harmless("nothing"),
    Harmless("one thread", threads=1),
    Harmless("another batch size", around=lambda: patch("bench.gate.generations.BATCH", 3)),
    Harmless("basic graph optimisation", around=_basic_optimisation),
    Harmless(
        "no memory arena, no memory pattern",
        around=lambda: _session_options(enable_cpu_mem_arena=False, enable_mem_pattern=False),
    ),
    Harmless("a KV buffer of another length", around=lambda: patch("runtime.kv_cache.BLOCK", 320)),
    Harmless("the next opset", in_graphs(_newer_opset), target="ort"),
    Harmless("nodes in another order", in_graphs(_node_order)),
    Harmless("other names of nodes, values and weights", in_graphs(_names)),
    Harmless("another layout of the external data", _data_layout),
    Harmless("norm weights inside the graph", _small_inside),
    Harmless("logits of every position", _all_logits),
    Harmless("identities put in", in_graphs(_identities), target="ort"),
    Harmless("producer, notes and a README", _notes),
    Harmless("rotary tables by another sine", _other_numerics),
    Harmless("tokenizer file serialised again", _tokenizer_again),
    Harmless("a comment in the chat template", _template_comment),
    Harmless("small constants as nodes", in_graphs(_constants_as_nodes), target="ort"),
    Harmless("default attributes written out", in_graphs(_defaults_written), target="ort"),
    Harmless("SiLU in one operator", in_graphs(_silu_in_one), target="ort"),
    Harmless("two changes of shape in one", in_graphs(_reshaped_once)),
    Harmless("configuration and generation settings saved again", _settings_again),
    Harmless("attention windows as large as the context", window_of_the_context),
    Harmless("a mask of its own for each windowed layer", mask_of_each_layer),
    Harmless("biases added from the other side", bias_first),
    Harmless("default attributes of norms left out", in_graphs(defaults_left_out)),
)
"""Beside these, fp32 -> fp16 in its own tier: the whole catalogue runs over an fp16 export as well."""
