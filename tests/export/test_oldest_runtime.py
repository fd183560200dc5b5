"""From which ONNX Runtime on a graph means what it should: derived from it, in the manifest, stamped on the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.manifest import GENAI_CONFIG, first_line, read_manifest, release
from export.oldest_runtime import FORMS, IR_VERSIONS, MS, OPSETS, TRIED_FROM, ir_version_of, oldest_runtime

Exports = Callable[..., Path]
HEAD = "MatMulNBits bits=8 (lm_head.MatMulNBits)"
MADE: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "fp32": ("fp32", {}, "1.20.1", "SkipSimplifiedLayerNormalization (", 8),
    "int8 head": ("int4", {"method": "rtn"}, "1.23.0", HEAD, 11),
    "int4 head": ("int4", {"method": "rtn", "lm_head": "int4"}, "1.20.1", "SkipSimplifiedLayerNormalization (", 8),
    "int8 embedding": (
        *("int4", {"method": "rtn", "lm_head": "int4", "embedding": "int8"}),
        *("1.23.0", "GatherBlockQuantized bits=8 (model.embed_tokens.weight.GatherBlockQuantized)", 8),
    ),
    "standard operators": ("fp16", {"target": "tensorrt"}, "1.25.0", "TensorScatter (", 11),
    "plain": ("fp32", {"target": "plain"}, TRIED_FROM, "nothing older was tried", 8),
}


@pytest.mark.parametrize("kind", MADE)
def test_an_export_says_its_oldest_runtime(exports: Exports, kind: str) -> None:
    precision, spec, oldest, because, ir_version = MADE[kind]
    folder = exports(precision, spec)
    manifest = read_manifest(folder)
    assert manifest.oldest_runtime == oldest
    assert manifest.oldest_because.startswith(because)
    for name in {manifest.decode_graph, manifest.scoring_graph}:
        assert onnx.load(folder / name, load_external_data=False).ir_version == ir_version
    genai = folder / GENAI_CONFIG
    assert not genai.exists() or json.loads(genai.read_text())["oldest_onnxruntime"] == oldest


def graph(*nodes: onnx.NodeProto, opset: int = 18, ir_version: int = 8) -> onnx.ModelProto:
    made = helper.make_graph(list(nodes), "g", [], [])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def test_the_form_counts_not_the_operator_alone() -> None:
    four, eight = (helper.make_node("MatMulNBits", [], [], "n", domain=MS, bits=bits) for bits in (4, 8))
    assert oldest_runtime(graph(four))[0] == "1.20.0"
    assert oldest_runtime(graph(four, eight)) == (
        "1.23.0",
        "MatMulNBits bits=8 (n), which older ones refuse or, 1.22, get wrong on some CPUs",
    )
    assert oldest_runtime(graph(helper.make_node("MatMulNBits", [], [], bits=8)))[0] == TRIED_FROM  # another domain
    assert (ir_version_of(graph(four), 8), ir_version_of(graph(four, eight), 8), ir_version_of(graph(eight), 12)) == (
        *(8, 11),
        12,
    )


def test_every_graph_and_every_function_counts() -> None:
    scatter = helper.make_node("TensorScatter", [], [])
    assert oldest_runtime(graph(), graph(scatter))[0] == "1.25.0"
    inside = graph()
    inside.functions.append(helper.make_function("d", "f", [], [], [scatter], []))
    assert oldest_runtime(inside)[0] == "1.25.0"


def test_operator_sets_and_file_versions_count() -> None:
    assert oldest_runtime(graph(opset=24)) == ("1.24.1", "operator set 24, which older ones refuse")
    assert oldest_runtime(graph(ir_version=14)) == ("1.32.0", "IR version 14, which older ones refuse")
    assert oldest_runtime(graph(opset=99)) == oldest_runtime(graph(ir_version=99)) == ("", "")


def test_versions_are_ordered() -> None:
    descending = ["2.0.0", "1.33.0", "1.33.0.dev20261101", "1.32.1+cu13", "1.32", "1.20.1", "1.20.1rc1", "1.9.0"]
    assert sorted(descending, key=release) == descending[::-1]
    assert release("1.32") == release("1.32.0")
    with pytest.raises(ValueError, match="'newest' is no version"):
        release("newest")


def test_the_docs_have_the_table() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "export.md").read_text().splitlines()
    wanted = {f"`{form}`": form.oldest for form in FORMS}
    wanted |= {f"operator set {number}": oldest for number, oldest in OPSETS.items()}
    wanted |= {f"IR version {number}": oldest for number, oldest in IR_VERSIONS.items()}
    for form, oldest in wanted.items():
        assert [row for row in rows if row.startswith(f"| {form} | {oldest} |")], form


def test_the_cause_at_a_long_lines_end_is_kept() -> None:
    said = first_line(ValueError("FAIL : Load model " + "x" * 900 + " Unsupported model IR version: 11\nmore"))
    assert (said[:18], said[-33:], len(said)) == ("FAIL : Load model ", " Unsupported model IR version: 11", 300)
    assert first_line(ValueError("y" * 300)) == "y" * 300


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        (
            "Load model from /a b/model.onnx failed:/onnxruntime_src/onnxruntime/core/graph/model.cc:181 "
            "onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::ModelOptions&) ",
            "Unsupported model IR version: 11, max supported IR version: 10",
        ),
        (
            "Status Message: /onnxruntime_src/onnxruntime/contrib_ops/cpu/matmul_nbits.cc:94 onnxruntime::contrib::"
            "MatMulNBits<T1>::MatMulNBits(const onnxruntime::OpKernelInfo&) [with T1 = float] ",
            "nbits_ == 4 was false. Only 4b quantization is supported",
        ),
    ],
)
def test_a_place_in_onnxruntimes_sources_is_left_out(place: str, cause: str) -> None:
    said = first_line(RuntimeError(place + cause))
    assert "onnxruntime_src" not in said
    assert "&" not in said
    assert said.startswith(place[:14])
    assert said.endswith(f" {cause}")


@pytest.fixture(scope="module")
def onnxruntime_1_22(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the last ONNX Runtime that misreads 8 bits, from the package index."""
    home = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime==1.22.1", "numpy"], check=True)
    return python


RUN = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feed = {"input_ids": np.array([[7, 19, 8, 12, 9]]), "attention_mask": np.ones((1, 5), np.int64)}
for i in session.get_inputs()[2:]:
    feed[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
np.save(sys.argv[2], session.run(["logits"], feed)[0])
"""


@pytest.mark.slow
def test_an_old_runtime_reads_a_form_right_or_refuses_it(
    exports: Exports, onnxruntime_1_22: str, tmp_path: Path
) -> None:
    def run(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
        graph = folder / "model_scoring.onnx"
        command = [python, "-c", RUN, str(graph), str(tmp_path / "logits.npy")]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"})

    four, eight = (exports("int4", {"method": "rtn", "lm_head": head}) for head in ("int4", "int8"))
    assert run(sys.executable, four).returncode == 0
    now = np.load(tmp_path / "logits.npy")
    assert run(onnxruntime_1_22, four).returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), now, atol=0.02 * np.abs(now).max())
    refused = run(onnxruntime_1_22, eight)
    assert refused.returncode != 0
    assert "Unsupported model IR version: 11, max supported IR version: 10" in refused.stderr
