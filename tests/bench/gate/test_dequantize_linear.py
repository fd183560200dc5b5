"""The gate on int8 and int4 of the target ``tensorrt``: right folders pass, each damaged weight is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from bench.defects.workshop import Workshop
from bench.gate.registry import CHECKS
from bench.gate.validate import Gate
from tests.bench.gate.test_checks import found

Exports = Callable[..., Path]
Workshops = Callable[..., Workshop]
NAME = "model.layers.1.mlp.up_proj.weight"
PARTS = {"keep_float": "none", "lm_head": "int8", "target": "tensorrt"}


def spec(method: str = "rtn", **fields: Any) -> dict[str, Any]:
    return {**PARTS, "method": method, **fields}


@pytest.mark.parametrize("activations", ["fp16", "fp32"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_true_export_passes_every_exact_check(
    precision: str, activations: str, exports: Exports, subjects: Callable[..., Any]
) -> None:
    gate = Gate(subjects(exports(precision, spec(activations=activations))))
    results = [gate.result(c) for c in CHECKS if c.kind == "exact"]
    # tensorrt_compile is SKIPPED without its extra, and has no engine in fp32.
    assert {r.name: r.summary for r in results if r.status not in ("PASS", "REPORTED", "SKIPPED")} == {}
    assert sum(r.status == "PASS" for r in results) >= 9


@pytest.mark.parametrize("method", ["rtn", "hqq", "kquant", "gptq"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_audit_knows_each_quantiser(
    precision: str, method: str, exports: Exports, subjects: Callable[..., Any], tmp_path: Path
) -> None:
    folder = exports(precision, spec(method))
    result = found("weights", subjects(folder))
    assert result.status == "PASS", result.summary
    assert "inside the quantiser's bound" in result.summary
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "manifest.json").unlink()
    result = found("weights", subjects(bare))
    assert result.status == "PASS", result.summary
    assert "quantised" in result.summary


def _off_by_one(codes: NDArray[Any], _: NDArray[Any]) -> None:
    codes[40, 5] += 1 if codes[40, 5] < 7 else -1


def _row_zeroed(codes: NDArray[Any], _: NDArray[Any]) -> None:
    codes[:, 9] = 0


def _rows_swapped(codes: NDArray[Any], scales: NDArray[Any]) -> None:
    for part in (codes, scales):
        part[:, [20, 21]] = part[:, [21, 20]].copy()


def _scale_wrong(_: NDArray[Any], scales: NDArray[Any]) -> None:
    scales[1, 3] *= 1.5


def _scale_that_hides_a_lost_row(codes: NDArray[Any], scales: NDArray[Any]) -> None:
    codes[:, 7], scales[:, 7] = 0, 1e4


def _blocks_swapped(_: NDArray[Any], scales: NDArray[Any]) -> None:
    scales[:] = scales[::-1].copy()


@pytest.mark.parametrize(
    "damage",
    [_off_by_one, _row_zeroed, _rows_swapped, _scale_wrong, _scale_that_hides_a_lost_row, _blocks_swapped],
    ids=lambda d: d.__name__,
)
@pytest.mark.parametrize(("precision", "method"), [("int8", "rtn"), ("int4", "rtn"), ("int4", "kquant")])
def test_damage_is_named(
    precision: str,
    method: str,
    damage: Callable[[NDArray[Any], NDArray[Any]], None],
    workshop: Workshops,
    subjects: Callable[..., Any],
) -> None:
    if (method, damage) == ("kquant", _off_by_one):
        pytest.skip("kquant's bound is 1.3 times the squared error of a block: one code may be off by one")
    shop = workshop(precision, spec(method))
    with shop.weight(f"{NAME}.codes") as codes, shop.weight(f"{NAME}.scales") as scales:
        damage(codes, scales)
    result = found("weights", subjects(shop.folder))
    assert (result.status, [f.where for f in result.findings]) == ("FAIL", [f"{NAME}.codes"]), result.summary
    assert result.findings[0].layer == 1


def test_another_fine_tune_is_named(
    checkpoints: Exports, exports: Exports, subjects: Callable[..., Any], tmp_path: Path
) -> None:
    """The folder of a checkpoint whose one layer was trained on, under this one's manifest."""
    from export.pipeline import export_model
    from export.spec import ExportSpec

    other = shutil.copytree(checkpoints(), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    noise = torch.randn(tensors[NAME].shape, generator=torch.Generator().manual_seed(0))
    tensors[NAME] *= 1 + 0.2 * noise
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "folder"
    export_model(ExportSpec(str(other), "int4", **spec("kquant")), folder)
    result = found("weights", subjects(folder))
    assert [f.where for f in result.findings] == [f"{NAME}.codes"]


def test_a_row_zeroed_under_a_third_party_export_is_named(
    exports: Exports, subjects: Callable[..., Any], tmp_path: Path
) -> None:
    shop = Workshop(exports("int4", spec()), tmp_path / "copy", tmp_path)
    with shop.weight(f"{NAME}.codes") as codes:
        _row_zeroed(codes, codes)
    (shop.folder / "manifest.json").unlink()
    result = found("weights", subjects(shop.folder))
    assert result.status == "FAIL"
    assert "9" in result.findings[0].what
    assert NAME in result.findings[0].where


def test_slots_of_the_cache_out_of_order_are_open(
    exports: Exports, subjects: Callable[..., Any], tmp_path: Path
) -> None:
    """Without a manifest the slots' numbers are known only as 0, 1, 2 and so on."""
    shop = Workshop(exports("int4", spec()), tmp_path / "copy", tmp_path)

    def change(model: onnx.ModelProto) -> None:
        slots = next(t for t in model.graph.initializer if list(t.dims)[-1:] == [160] and t.data_type == 7)
        numbers = onnx.numpy_helper.to_array(slots).copy()
        numbers.flat[[90, 91]] = numbers.flat[[91, 90]]
        slots.CopyFrom(onnx.numpy_helper.from_array(numbers, slots.name))

    shop.graphs(change)
    (shop.folder / "manifest.json").unlink()
    result = found("weights", subjects(shop.folder))
    assert result.status == "INCONCLUSIVE"
    assert "is no tensor of the checkpoint" in result.findings[0].what


def test_an_attribute_of_a_dequantisation_is_compared(
    workshop: Workshops, exports: Exports, subjects: Callable[..., Any]
) -> None:
    shop = workshop("int4", spec())

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == f"{NAME.removesuffix('.weight')}.DequantizeLinear")
        next(a for a in node.attribute if a.name == "block_size").i = 64

    shop.graphs(change)
    result = found("graph", subjects(shop.folder))
    assert result.status == "FAIL"
    assert "block_size is 64, the configuration demands 32" in result.findings[0].what


def test_the_workshop_writes_what_it_read(workshop: Workshops) -> None:
    shop = workshop("int4", spec())
    before = (shop.folder / "model.onnx.data").read_bytes()
    with shop.weight(f"{NAME}.codes") as codes:
        assert codes.shape == (64, 96)
        assert (codes.min(), codes.max()) == (-8, 7)
        kept = codes.copy()
    assert (shop.folder / "model.onnx.data").read_bytes() == before
    with shop.weight(f"{NAME}.codes") as codes:
        np.testing.assert_array_equal(codes, kept)
