"""The file to attach: it runs without anything of ours, tells the faulty runtime from the right one, and is small."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.matrix import reproduce
from bench.matrix.differ import Difference, RunnerError, differ
from bench.matrix.reproduce import LIMIT_BYTES, write_reproduction
from runtime.loading import read_folder
from runtime.ort_session import accuracy_level
from tests.bench.matrix import faults
from tests.bench.matrix.faults import FAMILY, FAULTS, TENSORRT_FAULTS, Fault, LocalRunner

IDS = [(7 * k * k + 3 * k) % 324 + 7 for k in range(150)]
TENSORRT = {"target": "tensorrt", "activations": "fp32"}


def written(folder: Path, fault: Fault, path: Path) -> tuple[Difference, int]:
    manifest = read_folder(folder, verify=False)
    options = accuracy_level(manifest)
    right, wrong = (LocalRunner(f"onnxruntime {n}", f, options, RunnerError) for n, f in (("1", None), ("2", fault)))
    found = differ(folder, manifest, right, wrong, IDS)
    assert found is not None
    return found, write_reproduction(found, path, right, wrong)


def run(path: Path, fault: Fault | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the file ends with in this process, under a fault or without one."""
    import onnxruntime as ort

    space: dict[str, Any] = {"__name__": "reproduction"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    with monkeypatch.context() as m:
        m.setattr(sys, "argv", [str(path)])
        if fault:
            m.setattr(ort, "InferenceSession", faults.faulty_session(ort.InferenceSession, fault))
        return int(space["main"]())


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_told_from_the_right_runtime(
    name: str, exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    path = tmp_path / "reproduce.py"
    _, size = written(exports(fault.precision), fault, path)
    assert size == path.stat().st_size < LIMIT_BYTES // 5
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


@pytest.mark.parametrize("name", TENSORRT_FAULTS)
def test_standard_operators(
    name: str, exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = TENSORRT_FAULTS[name]
    path = tmp_path / "reproduce.py"
    _, size = written(exports(spec=TENSORRT), fault, path)
    assert size < LIMIT_BYTES
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")
OF_FAMILY = {
    "bias": Fault(("Add",), faults._output_times(1.02), among=r"layers\.1\..*qkv_proj"),
    "head norm": Fault(NORMS, faults._output_times(1.02), among=r"layers\.1/(SimplifiedL\w+_1|RMSN\w+_2)$"),
    "attention": Fault(("GroupQueryAttention", "Attention"), faults._output_times(1.02), layer=1),
    "window": Fault(("GroupQueryAttention",), lambda w: w.attribute("local_window_size", 12), layer=1),
}


BOTH = (
    *(("mistral", "attention"), ("qwen2", "bias")),
    *(("qwen3", "bias"), ("qwen3", "head norm"), ("qwen3", "attention")),
)


@pytest.mark.parametrize(
    ("name", "kind", "spec"),
    [
        *((name, kind, spec) for name, kind in BOTH for spec in ({}, TENSORRT)),
        *((name, "window", {}) for name in ("mistral", "qwen2")),  # in the other graph it is the mask's
    ],
)
def test_other_architectures(
    name: str,
    kind: str,
    spec: dict[str, Any],
    exports: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault, path = OF_FAMILY[kind], tmp_path / "reproduce.py"
    found, size = written(exports(spec=spec, **FAMILY[name]), fault, path)
    assert (found.layer, found.op_type in fault.operators) == (1, True), found.what
    assert size < LIMIT_BYTES // 5
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


def test_a_fused_product_over_dequantised_weights(
    exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(("DequantizeLinear",), faults._output_times(1.1), among=r"layers\.1\..*down_proj")
    path = tmp_path / "reproduce.py"
    written(exports("int4", TENSORRT), fault, path)
    assert "SESSION_OPTIONS = {'session.qdq_matmulnbits_accuracy_level': '4'}" in path.read_text()
    assert "#   input 0: [96, 16] INT4, a weight" in path.read_text()
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


def test_it_runs_in_an_environment_whose_runtime_is_wrong(exports: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "reproduce.py"
    found, _ = written(exports(), FAULTS["attention scale off by 2 %"], path)
    wrong = faults.faulty_environment(tmp_path / "environment", "attention scale off by 2 %")
    for python, code, word in ((wrong, 1, "DIFFERS"), (sys.executable, 0, "as expected")):
        done = subprocess.run([python, "-P", path], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.splitlines()[-1].endswith(word)
        assert done.stdout.startswith("onnxruntime 1.")
    text = path.read_text()
    head = text[: text.index("import base64")]
    assert found.node in head
    assert all(line.startswith("#") for line in head.splitlines() if line)
    for line in ("onnxruntime 2 differs from onnxruntime 1", "com.microsoft::GroupQueryAttention", "scale = 0.25"):
        assert line in head
    assert "num_heads = 2\n" in head  # of 4
    assert "kv_num_heads = 1\n" in head  # of 2


def test_a_name_in_the_graph_is_no_code(
    exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, path, folder = FAULTS["attention scale off by 2 %"], tmp_path / "reproduce.py", exports()
    found, _ = written(folder, fault, path)
    assert found.case is not None
    found.case.model.graph.node[-1].name += "\nraise SystemExit(9)"
    options = accuracy_level(read_folder(folder, verify=False))
    right, wrong = (LocalRunner(f"onnxruntime {n}", f, options, RunnerError) for n, f in (("1", None), ("2", fault)))
    write_reproduction(found, path, right, wrong)
    assert "# raise SystemExit(9)" in path.read_text()
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


def test_a_crash(exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops the runtime is kept; here it is an attribute that it does not take."""
    fault = Fault(faults.GQA, faults._attribute("num_heads", 3), faults.HERE)
    path = tmp_path / "reproduce.py"
    found, _ = written(exports(), fault, path)
    assert (found.layer, found.op_type) == (1, "GroupQueryAttention")
    assert found.error
    assert "# onnxruntime 2 stops: " in path.read_text()
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


def test_what_is_too_large_loses_digits_and_is_written_anyway(
    exports: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, path = FAULTS["last terms of a product missing"], tmp_path / "reproduce.py"
    _, whole = written(exports(), fault, path)
    monkeypatch.setattr(reproduce, "LIMIT_BYTES", whole - 1)
    _, size = written(exports(), fault, path)
    assert size < whole
    monkeypatch.setattr(reproduce, "LIMIT_BYTES", 100)
    _, size = written(exports(), fault, path)
    assert size > 100
    assert f"This file is larger than {100:,} bytes" in path.read_text()
    assert (run(path, fault, monkeypatch), run(path, None, monkeypatch)) == (1, 0)


def test_a_difference_that_only_the_whole_graph_has(exports: Callable[..., Path], tmp_path: Path) -> None:
    found, _ = written(exports(), FAULTS["softcap of 5"], tmp_path / "reproduce.py")
    with pytest.raises(BenchError, match="only the whole graph differs"):
        write_reproduction(replace(found, case=None), tmp_path / "no.py", LocalRunner(), LocalRunner())
    with pytest.raises(BenchError, match="it did not differ again"):
        write_reproduction(found, tmp_path / "no.py", LocalRunner(), LocalRunner())
    assert not (tmp_path / "no.py").exists()


def test_padding_in_what_is_expected_is_nan(exports: Callable[..., Path], tmp_path: Path) -> None:
    """Of an uneven batch only tokens count: what a kernel leaves at padding is its own business."""
    found, _ = written(exports(), FAULTS["norm wrong in batches"], tmp_path / "reproduce.py")
    assert found.case is not None
    scenario, value = found.case.scenario, next(iter(found.case.expected.values()))
    mask = reproduce._mask(scenario, value)
    assert mask.shape == value.shape
    assert np.array_equal(mask.any(axis=-1), scenario.new)
