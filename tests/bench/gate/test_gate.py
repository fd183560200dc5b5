"""The gate on the tiny model: a true export passes, deliberate defects fail, each by the right check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bench.gate.old_gate import GateInputs, consistency_check, greedy_checks, run_gate, task_status
from bench.gate.statistics import TIERS
from bench.latency.workload import PROFILES
from reports.record import Parity
from runtime.loading import load
from runtime.text import load_tokenizer
from runtime.torch_session import TorchSession

Exports = Callable[..., Path]
PROFILE = replace(PROFILES["smoke"], window=96, windows=None, null_windows=2, items=3)


@pytest.fixture
def dataset(tiny_dataset: Any) -> Any:
    """Texts in the tiny tokenizer's words."""
    return tiny_dataset


def judge(folder: Path, checkpoint: Path, dataset: Any, tier: str = "fp32") -> Parity:
    with load(folder, threads=1, verify=False) as ours, TorchSession(checkpoint) as theirs:
        return run_gate(
            GateInputs(
                candidate=ours,
                baseline=theirs,
                null=lambda: TorchSession(checkpoint, attention="eager"),
                tokenizer=load_tokenizer(folder),
                eos=(2,),
                dataset=dataset,
                profile=PROFILE,
                tier=TIERS[tier],
                seed=1,
            )
        )


def failed(parity: Parity) -> set[str]:
    return {c.name for c in parity.checks if c.status == "FAIL"}


def test_a_true_export_passes(exports: Exports, checkpoints: Exports, dataset: Any) -> None:
    parity = judge(exports(), checkpoints(), dataset)
    assert {c.name: c.status for c in parity.checks if c.status not in ("PASS", "SUSPICIOUS")} == {}
    assert {(t.task, t.metric) for t in parity.tasks} == {
        ("qa", "exact match"),
        ("qa", "token F1"),
        ("summarization", "ROUGE-1"),
        ("summarization", "ROUGE-2"),
        ("summarization", "ROUGE-L"),
    }
    assert all(t.status == "PASS" and t.candidate == t.baseline for t in parity.tasks)
    assert all(c.null_value is not None for c in parity.checks[:4])
    assert parity.examples


def test_fp16_passes_its_own_tier_and_not_fp32s(exports: Exports, checkpoints: Exports, dataset: Any) -> None:
    assert failed(judge(exports("fp16"), checkpoints(), dataset)) >= {"mean_kld"}
    mean = next(c for c in judge(exports("fp16"), checkpoints(), dataset, "fp16").checks if c.name == "mean_kld")
    assert mean.status in ("PASS", "SUSPICIOUS")


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], None], names: tuple[str, ...]) -> None:
    for name in names:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        onnx.save_model(model, folder / name)


def set_attribute(op: str, name: str, value: Any, which: int = 0) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = [n for n in model.graph.node if n.op_type == op][which]
        node.attribute.remove(next(a for a in node.attribute if a.name == name))
        node.attribute.append(helper.make_attribute(name, value))

    return change


def swap_layers(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if "mlp.down_proj" in name:
                other = {"0": "1", "1": "0"}[name.split(".")[2]]
                node.input[i] = name.replace(f"layers.{name.split('.')[2]}", f"layers.{other}")


BOTH = ("model.onnx", "model_scoring.onnx")
DEFECTS: dict[str, tuple[Callable[[onnx.ModelProto], None], tuple[str, ...], str]] = {
    "attention scale off by 2 %": (set_attribute("GroupQueryAttention", "scale", 0.255), BOTH, "mean_kld"),
    "interleaved rotary": (set_attribute("GroupQueryAttention", "rotary_interleaved", 1), BOTH, "mean_kld"),
    "norm epsilon 1e-2": (set_attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-2), BOTH, "mean_kld"),
    "two down projections swapped": (swap_layers, BOTH, "top1_agreement"),
    "decode graph alone differs": (
        set_attribute("GroupQueryAttention", "scale", 0.28, 1),
        ("model.onnx",),
        "decode_consistency",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name: str, exports: Exports, checkpoints: Exports, dataset: Any, tmp_path: Path) -> None:
    change, graphs, check = DEFECTS[name]
    folder = shutil.copytree(exports(), tmp_path / "bad")
    edit_graph(folder, change, graphs)
    assert check in failed(judge(folder, checkpoints(), dataset))


def test_another_checkpoint_is_another_model(exports: Exports, checkpoints: Exports, dataset: Any) -> None:
    parity = judge(exports(seed=1), checkpoints(), dataset)
    assert failed(parity) >= {"mean_kld", "top1_agreement", "greedy_tokens"}


def test_uneven_rows_mixed_up_are_caught(
    exports: Exports, checkpoints: Exports, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence lengths taken from row 0, as a runtime that ignores padding does."""
    from runtime import host_decode

    def row_zero(ids: Any) -> Any:
        from runtime.session import right_pad

        padded, mask = right_pad(ids)
        return padded, np.repeat(mask[:1], len(mask), axis=0)

    monkeypatch.setattr(host_decode, "right_pad", row_zero)
    assert "batch_consistency" in failed(judge(exports(), checkpoints(), dataset))


def test_one_wrong_decode_step_is_enough(exports: Exports, checkpoints: Exports, dataset: Any) -> None:
    with load(exports(), threads=1) as session:
        true_step, calls = session.step, [0]

        def step(ids: Any) -> Any:
            calls[0] += 1
            logits = true_step(ids).copy()
            logits[:, 7] += 0.2 * (calls[0] == 10)
            return logits

        session.step = step  # type: ignore[method-assign]
        window = list(range(3, 99))
        found = {c.name: c.status for c in consistency_check(session, [window], TIERS["fp32"])}
    assert found == {"decode_consistency": "FAIL", "batch_consistency": "PASS"}


@pytest.mark.parametrize(
    ("low", "high", "items", "tier", "status"),
    [
        (0.0, 0.0, 3, "fp32", "PASS"),
        (-2.0, -1.0, 40, "fp32", "FAIL"),
        (-2.0, -1.0, 40, "fp16", "FAIL"),
        (-2.0, -1.0, 3, "fp32", "INCONCLUSIVE"),
        (-2.0, 1.0, 40, "fp32", "INCONCLUSIVE"),
        (-2.0, 1.0, 40, "fp16", "REPORTED"),
    ],
)
def test_status_of_a_task(low: float, high: float, items: int, tier: str, status: str) -> None:
    assert task_status(low, high, -0.03, items, TIERS[tier]) == status


def test_short_answers_fall_out_of_the_length_band() -> None:
    from bench.data.loading import Item
    from bench.gate.generations import Outputs

    item = Item("i", "qa", {"context": "x", "question": "y"}, ("z",))
    full = Outputs(item, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    cut = Outputs(item, (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    tokens, band = greedy_checks([full] * 99 + [cut], TIERS["fp32"])
    assert (tokens.status, band.status) == ("PASS", "PASS")
    tokens, band = greedy_checks([full, cut, cut, cut], TIERS["fp32"])
    assert (tokens.status, band.status) == ("FAIL", "FAIL")
    assert "first divergence at token 9" in tokens.detail
