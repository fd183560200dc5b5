"""`llama-onnx engine`: the folder that it writes, and that a refusal leaves nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli.main import main
from bench.defects.workshop import Workshop
from export.manifest import MANIFEST_NAME, read_manifest
from tests.bench.gate.test_tensorrt_compile import unfused_attention
from tests.runtime.test_trt_compiler import softcap

Exports = Callable[..., Path]
TARGET = {"target": "tensorrt"}
HEADS = {"head_dim": 64}
pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


def test_engines_with_their_manifest(exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = exports("fp16", TARGET, **HEADS), tmp_path / "engines"
    asked = ["engine", str(folder), "--out", str(out), "--new-tokens", "20", "--batch", "4"]
    assert main([*asked, "--sm", "89,120", "--decode-profile", "--json"]) == 0
    assert {p.name for p in out.iterdir()} == {
        *("engine.json", "sm89.engine", "sm89.onnx", "sm120.engine", "sm120.onnx"),
    }
    document = json.loads((out / "engine.json").read_text())
    assert json.loads(capsys.readouterr().out) == document | {"folder": str(out)}
    for engine in document["engines"]:
        held = (out / engine["file"]).read_bytes()
        assert (engine["nbytes"], engine["sha256"]) == (len(held), hashlib.sha256(held).hexdigest())
        assert engine["seconds"] > 0
    assert [e["sm"] for e in document["engines"]] == [89, 120]
    files = read_manifest(folder).files
    assert document["sha256"] == {n: files[n].sha256 for n in ("model.onnx", "model.onnx.data")}
    assert document["layers"]["KV_CACHE_UPDATE"] == 4
    prefill, decode = document["profiles"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert prefill["shapes"]["input_ids"] == [[1, 1], [4, 140], [4, 140]]
    assert decode["shapes"]["input_ids"] == [[1, 1], [4, 1], [4, 1]]
    assert "neither the engines nor the EPContext models were loaded" in document["note"]
    assert main([*asked[:3], str(tmp_path / "one"), *asked[4:]]) == 0
    (alone,) = json.loads((tmp_path / "one/engine.json").read_text())["profiles"]
    assert alone == prefill
    capsys.readouterr()
    assert main(asked) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "spec", "said"),
    [
        ([], {}, "is of target ort; export it with --target tensorrt"),
        ([], TARGET, "computes in fp32, for which TensorRT has no fused attention; export it with --precision fp16"),
        (["--prompt", "200"], TARGET, "longer than a row"),
        (["--sm", "90"], TARGET, "75, 80, 86"),
    ],
)
def test_what_cannot_be_compiled(
    asked: list[str],
    spec: dict[str, str],
    said: str,
    exports: Exports,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = exports("fp16" if "--prompt" in asked else "fp32", spec, **HEADS)
    assert main(["engine", str(folder), "--out", str(tmp_path / "out"), "--new-tokens", "20", *asked]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("defect", "where", "why"),
    [
        (softcap, "layers.1", "softcap is not supported"),
        (unfused_attention, "present.1.value", "is read by 0 attentions, not by one (+2 more)"),
    ],
)
def test_a_refused_graph_leaves_nothing(
    defect: Callable[[Any], None],
    where: str,
    why: str,
    workshop: Callable[..., Workshop],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shop = workshop("fp16", TARGET, **HEADS, num_key_value_heads=4)
    shop.graphs(defect, ("decode",))
    shop.reseal()
    out = tmp_path / "home" / "out"
    assert main(["engine", str(shop.folder), "--out", str(out), "--new-tokens", "20"]) == 1
    said = capsys.readouterr().err
    assert where in said
    assert why in said
    assert (shop.folder / MANIFEST_NAME).is_file()
    assert list(out.parent.iterdir()) == []
