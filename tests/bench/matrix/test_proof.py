"""Every kernel fault of the catalogue, in an environment of its own, through the whole command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.cli.main import main
from reports.matrix import Matrix
from tests.bench.matrix.faults import FAULTS, faulty_environment

LEAST_RIGHT = 0.9
"""Of the faults in one layer: whose layer is named."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_fault_is_found_and_its_layer_named(
    precision: str,
    exports: Callable[..., Path],
    checkpoints: Callable[..., Path],
    tiny_dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA_ONNX_LOCK", str(tmp_path / "lock"))
    faults = {f"fault-{k}": name for k, name in enumerate(FAULTS) if FAULTS[name].precision == precision}
    for folder, name in faults.items():
        faulty_environment(tmp_path / folder, name)
    command = ["matrix", str(exports(precision=precision)), "--baseline", str(checkpoints()), "--mode", "standard"]
    command += ["--dataset", str(tiny_dataset_file), "--threads", "1", "--out", str(tmp_path / "out"), "--pairs", "0"]
    assert main([*command, "--runtime", ",".join(f"venv={tmp_path / f}" for f in faults)]) == 1
    rows = {r.text.removeprefix("venv="): r for r in Matrix.read(tmp_path / "out" / "matrix.json").rows}
    missed = [name for folder, name in faults.items() if rows[folder].difference is None]
    assert missed == []
    assert [name for folder, name in faults.items() if rows[folder].verdict != "FAIL"] == []
    in_one_layer = {folder: FAULTS[name] for folder, name in faults.items() if FAULTS[name].layer is not None}
    right = sum(
        1 for folder, fault in in_one_layer.items() if (d := rows[folder].difference) and d.layer == fault.layer
    )
    assert right >= LEAST_RIGHT * len(in_one_layer)
    sizes = {f: found.reproduction_bytes for f in faults if (found := rows[f].difference) is not None}
    assert max(sizes.values()) < 1_000_000
