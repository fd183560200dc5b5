"""`attributes`, `manifest` and `rotary_tables` each alone, where no other check stands in front of them.

A third-party export has no `graph` check, so these have to find what is theirs by themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bench.defects.in_graph import set_attribute
from bench.defects.workshop import Workshop
from bench.errors import BenchError
from bench.gate.canonical import attributes_of
from bench.gate.registry import BY_NAME
from bench.gate.validate import expected
from export.manifest import MANIFEST_NAME

Exports = Callable[..., Path]
Workshops = Callable[..., Workshop]
GQA = "GroupQueryAttention"
LAST = "SimplifiedLayerNormalization"
SKIP = "SkipSimplifiedLayerNormalization"


def of(model: Any, op: str) -> list[Any]:
    return [n for n in model.graph.node if n.op_type == op]


def attribute(op: str, name: str, change: Callable[[Any], Any], index: int = 1) -> Callable[[Any], None]:
    """Set an attribute of the index-th node of a type to ``change(old value)``."""

    def edit(model: Any) -> None:
        node = of(model, op)[index]
        set_attribute(node, name, change(attributes_of(node).get(name)))

    return edit


def renamed(op: str, to: str) -> Callable[[Any], None]:
    """One node of a type becomes another operator, so there is one too few."""

    def edit(model: Any) -> None:
        of(model, op)[-1].op_type = to

    return edit


def cache_of_layer_0(model: Any) -> None:
    of(model, GQA)[1].input[4] = of(model, GQA)[0].input[4]


def half_precision_cache(model: Any) -> None:
    value = next(i for i in model.graph.input if i.name.startswith("past_key_values.1.value"))
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "scale": (attribute(GQA, "scale", lambda _: 0.125 * 1.01), "scale is"),
    "scale that is nearly right": (attribute(GQA, "scale", lambda _: 0.25 * 1.0001), "scale is"),
    "epsilon": (attribute(SKIP, "epsilon", lambda old: old * 1.01), "epsilon is"),
    "no epsilon": (attribute(SKIP, "epsilon", lambda _: 0.0), "epsilon is"),
    "epsilon of the first norm": (attribute(LAST, "epsilon", lambda _: 1e-3, 0), "epsilon is"),
    "heads": (attribute(GQA, "num_heads", lambda old: old // 2), "num_heads is"),
    "KV heads": (attribute(GQA, "kv_num_heads", lambda old: old // 2), "kv_num_heads is"),
    "interleaved": (attribute(GQA, "rotary_interleaved", lambda _: 1), "rotary_interleaved is 1"),
    "no rotary embedding": (attribute(GQA, "do_rotary", lambda _: 0), "do_rotary is 0"),
    "window": (attribute(GQA, "local_window_size", lambda _: 100), "local_window_size is 100"),
    "softcap": (attribute(GQA, "softcap", lambda _: 30.0), "softcap is 30"),
    "smooth softmax": (attribute(GQA, "smooth_softmax", lambda _: 1), "smooth_softmax is 1"),
    "cache of another layer": (cache_of_layer_0, "reads and writes the cache of layers 0, 1"),
    "an attention too few": (renamed(GQA, "Mystery"), "1 GroupQueryAttention for 2 layers"),
    "a norm too few": (renamed(SKIP, "Mystery"), "4 fused norms where 2 layers"),
    "type of the cache": (half_precision_cache, "not of the claimed type"),
}


@pytest.mark.parametrize("role", ["decode", "scoring"])
@pytest.mark.parametrize("name", EDITS)
def test_attributes_alone_names_an_edit(
    name: str, role: str, workshop: Workshops, subjects: Callable[..., Any]
) -> None:
    change, what = EDITS[name]
    shop = workshop()
    shop.graphs(change, (role,))
    result = BY_NAME["attributes"].run(subjects(shop.folder))
    assert result.status == "FAIL"
    assert [what in f.what for f in result.findings] == [True], result.findings
    graph = shop.manifest.decode_graph if role == "decode" else shop.manifest.scoring_graph
    assert result.findings[0].where.startswith(graph)


def test_attributes_names_the_layer(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    shop = workshop()
    shop.graphs(EDITS["window"][0])
    result = BY_NAME["attributes"].run(subjects(shop.folder))
    assert [f.layer for f in result.findings] == [1, 1]


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "context_length": lambda m: m.update(context_length=m["context_length"] * 2),
    "vocab_size": lambda m: m.update(vocab_size=m["vocab_size"] - 1),
    "eos_token_ids": lambda m: m.update(eos_token_ids=[*m["eos_token_ids"], 7]),
    "kv.layers": lambda m: m["kv"].update(layers=1),
    "kv.kv_heads": lambda m: m["kv"].update(kv_heads=m["kv"]["kv_heads"] * 2),
    "kv.head_dim": lambda m: m["kv"].update(head_dim=m["kv"]["head_dim"] * 2),
    "kv.dtype": lambda m: m["kv"].update(dtype="fp16"),
    "precision": lambda m: m.update(precision="fp16"),
    "activations": lambda m: m.update(activations="fp16"),
    "attention": lambda m: m.update(attention="Attention"),
    "padding": lambda m: m.update(padding="any"),
    "inputs": lambda m: m.update(inputs=m["inputs"][:-1]),
    "outputs": lambda m: m.update(outputs=m["outputs"][:-1]),
    "weights": lambda m: m.update(weights=m["weights"][:-1]),
    "oldest_runtime": lambda m: m.update(oldest_runtime="1.9.0"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_is_named(claim: str, workshop: Workshops, subjects: Callable[..., Any]) -> None:
    shop = workshop()
    shop.json(MANIFEST_NAME, CLAIMS[claim])
    result = BY_NAME["manifest"].run(subjects(shop.folder))
    assert result.status == "FAIL"
    assert f"{MANIFEST_NAME}, {claim}" in [f.where for f in result.findings]


@pytest.mark.parametrize("version", ["", "1.99.0"])
def test_no_claim_and_a_careful_one_are_no_findings(
    version: str, workshop: Workshops, subjects: Callable[..., Any]
) -> None:
    """A folder from before there was that field, and one from before the table said less."""
    shop = workshop()
    shop.json(MANIFEST_NAME, lambda m: m.update(oldest_runtime=version))
    assert BY_NAME["manifest"].run(subjects(shop.folder)).status == "PASS"


def test_tables_shorter_than_the_context_are_named(
    workshop: Workshops, checkpoints: Exports, subjects: Callable[..., Any]
) -> None:
    """Every row that is there is right; past the last one the operator would read what is not there."""
    shop = workshop()
    context = json.loads((checkpoints() / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    with shop.weight("model.rope_cos") as cos:
        rows = np.array(cos[: context - 8])

    def cut(model: Any) -> None:
        table = next(t for t in model.graph.initializer if t.name == "model.rope_cos")
        table.CopyFrom(numpy_helper.from_array(rows, "model.rope_cos"))

    shop.graphs(cut)
    result = BY_NAME["rotary_tables"].run(subjects(shop.folder))
    assert result.status == "FAIL"
    assert [f.what for f in result.findings] == [f"has {context - 8} rows, the context is {context}"]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("{# a note #}Hello {{ name }}.", True),
        ("Hel{# in the midst #}lo {{ name }}.", True),
        ("Hello {{  name  }}.\r\n", True),
        ("Hello {{ '{#' }}{% if name == 'x' %}No{% endif %}{{ '#}' }}{{ name }}.", False),
        ("Hello {% if name == 'x' %}No{% endif %}{{ name }}.", False),
        ("Hello {{ name }}!", False),
        ("Hello {% generation %}{{ name }}{% endgeneration %}.", False),
    ],
)
def test_a_template_is_compared_by_what_it_does(other: str, same: bool) -> None:
    from bench.gate.checks.text import _meaning

    assert (_meaning(other) == _meaning("Hello {{ name }}.")) == same


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("precision=fp32,target=ort", None),
        ("precision=fp16", "precision of the folder is fp32, fp16 was expected"),
        ("target=plain", "target of the folder is ort, plain was expected"),
        ("method=hqq", "method of the folder is none: it is not quantised, hqq was expected"),
    ],
)
def test_the_folder_does_not_choose_what_it_is_judged_as(
    text: str, what: str | None, exports: Exports, subjects: Callable[..., Any]
) -> None:
    result = BY_NAME["manifest"].run(replace(subjects(exports()), expect=expected(text)))
    assert result.status == ("FAIL" if what else "PASS")
    assert [f"{f.where} {f.what}" for f in result.findings] == ([what] if what else [])


def test_an_expectation_that_nothing_meets() -> None:
    assert expected(None) == {}
    assert expected(" precision = int8 ,") == {"precision": "int8"}
    for text in ("precision=fp8", "size=3", "fp16"):
        with pytest.raises(BenchError, match="cannot be met"):
            expected(text)


def test_a_folder_without_manifest_is_not_what_was_expected(
    exports: Exports, subjects: Callable[..., Any], tmp_path: Path
) -> None:
    """Its manifest left out, a folder is looked at less closely: who expects a target says no to that."""
    folder = shutil.copytree(exports(), tmp_path / "bare")
    (folder / "manifest.json").unlink()
    subject = subjects(folder)
    assert BY_NAME["manifest"].run(subject).status == "PASS"
    result = BY_NAME["manifest"].run(replace(subject, expect={"target": "ort"}))
    assert result.findings[0].what == "is none: there is no manifest, ort was expected"


def test_a_graph_whose_nodes_stand_after_their_readers_is_judged(workshop: Workshops, subjects: Any) -> None:
    """ONNX Runtime takes any order, so it is no reason to stop with an error."""

    def turn(model: Any) -> None:
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    shop = workshop()
    shop.graphs(turn)
    shop.reseal()
    for name in ("files", "graph", "attributes"):
        assert BY_NAME[name].run(subjects(shop.folder)).status == "PASS", name
