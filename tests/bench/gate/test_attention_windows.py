"""Attention windows are crossed by some check, however long they are: a window off by one is seen by the numbers alone.

The texts of a mode may all be shorter than a window of 4,096; then a tiled past crosses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from bench.defects.in_graph import attentions, set_attribute
from bench.gate.checks.graph import _window
from bench.gate.checks.numeric import CONTINUED, places_expected
from bench.gate.modes import MODES
from bench.gate.registry import BY_NAME

Exports = Callable[..., Path]
WINDOW = 512
MISTRAL: dict[str, Any] = {"model_type": "mistral", "sliding_window": WINDOW, "max_position_embeddings": 640}
PLACE = "the end of the attention window (from 512)"
NUMERIC = ("prefill_logits", "decode_steps", "batch_rows", "chunked_prefill", "mean_kld")


def longer_by(tokens: int) -> Callable[[Any], None]:
    """One layer's window by another one, as attribute; or that of the mask of an unfused graph."""

    def edit(model: Any) -> None:
        if any(n.op_type == "GroupQueryAttention" for n in model.graph.node):
            set_attribute(attentions(model)[1], "local_window_size", WINDOW + tokens)
            return
        changed = 0
        for node in model.graph.node:
            for a in (a for a in node.attribute if node.op_type == "Constant" and a.name == "value"):
                value = numpy_helper.to_array(a.t)
                if value.size == 1 and abs(float(value.reshape(-1)[0])) == WINDOW:
                    away = value + np.sign(value) * tokens
                    a.t.CopyFrom(numpy_helper.from_array(away.astype(value.dtype), a.t.name))
                    changed += 1
        assert changed

    return edit


@pytest.mark.parametrize("tokens", [1, -1])
@pytest.mark.parametrize(("precision", "spec"), [("fp32", {}), ("fp16", {}), ("fp32", {"target": "plain"})])
def test_a_window_off_by_one_beyond_every_text_is_seen_by_the_numbers(
    tokens: int, precision: str, spec: dict[str, Any], workshop: Callable[..., Any], subjects: Callable[..., Any]
) -> None:
    shop = workshop(precision, spec, **MISTRAL)
    (shop.folder / "manifest.json").unlink()  # a third-party export
    quick = replace(subjects(shop.folder, **MISTRAL), mode=MODES["quick"])
    good = BY_NAME["long_context"].run(quick)
    assert good.status == "PASS", good.summary
    assert PLACE in [p.place for p in good.evidence.places["long_context"]]
    _edit(shop, longer_by(tokens))
    quick.close()
    s = quick.at(shop.folder)
    wrong = BY_NAME["long_context"].run(s)
    assert wrong.status == "FAIL", wrong.summary
    klds = {p.place: p.kld for p in wrong.evidence.places["long_context"]}
    assert max(klds, key=lambda place: klds[place]) == PLACE
    s.close()
    for name in NUMERIC:
        assert BY_NAME[name].run(s).status != "FAIL", (
            f"{name} sees it as well: the window is no longer beyond all texts"
        )


def test_windows_that_another_exporter_left_out_are_named(
    workshop: Callable[..., Any], subjects: Callable[..., Any]
) -> None:
    """As onnxruntime-genai 0.18 does with Mistral's."""
    shop = workshop("fp32", {}, **MISTRAL)
    (shop.folder / "manifest.json").unlink()
    _edit(shop, lambda model: [set_attribute(n, "local_window_size", -1) for n in attentions(model)])
    found = BY_NAME["attributes"].run(subjects(shop.folder, **MISTRAL))
    assert found.status == "FAIL"
    assert [(f.layer, f.what) for f in found.findings[:2]] == [
        (layer, "local_window_size is -1, not 512") for layer in (0, 1)
    ]


def _edit(shop: Any, change: Callable[[Any], object]) -> None:
    import onnx

    for path in shop.folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        change(model)
        onnx.save(model, shop.own(path.name))


@pytest.mark.parametrize(
    ("changes", "crossed"),
    [
        ({"model_type": "llama"}, False),
        (MISTRAL, True),
        (MISTRAL | {"sliding_window": 640 - CONTINUED}, True),
        (MISTRAL | {"sliding_window": 640 - CONTINUED + 1}, False),  # nothing of 16 tokens lies beyond it
        (MISTRAL | {"sliding_window": CONTINUED}, False),  # every text reaches beyond it
        (MISTRAL | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, True),
        (MISTRAL | {"model_type": "qwen2", "use_sliding_window": False}, False),
        (MISTRAL | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, False),
    ],
)
@pytest.mark.parametrize("mode", ["quick", "standard"])
def test_a_window_is_crossed_wherever_the_context_allows(
    changes: dict[str, Any], crossed: bool, mode: str, exports: Exports, checkpoints: Exports, tiny_dataset: Any
) -> None:
    from bench.deployment import Deployment
    from bench.gate.validate import make_subject

    s = make_subject(exports(**changes), str(checkpoints(**changes)), MODES[mode], tiny_dataset, Deployment(threads=1))
    assert places_expected(s)["long_context"] == {"quick": 1, "standard": 2}[mode] + crossed


def test_the_window_that_a_node_must_have() -> None:
    """None, which is not asked for: an architecture that nobody described, or a layer that cannot be told."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    mixed = AutoConfig.for_model("qwen2", **sizes, use_sliding_window=True, sliding_window=24, max_window_layers=1)
    assert [_window(mixed, layer) for layer in (0, 1, None)] == [-1, 24, None]
    every = AutoConfig.for_model("mistral", **sizes, sliding_window=24)
    assert [_window(every, layer) for layer in (0, 1, None)] == [24, 24, 24]
    assert _window(AutoConfig.for_model("gemma2", **sizes), 0) is None
    assert _window(AutoConfig.for_model("granite", **sizes), 0) == -1
