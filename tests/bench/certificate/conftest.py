"""Keys, a folder, a baseline and a result of both: what the certificate's tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.digests import baseline_digest, folder_digest, hash_baseline, hash_folder
from bench.gate import judge
from bench.gate.statistics import Tier
from reports.validation import TaskEvidence, TaskMetric, Validation
from tests.synthetic import synthetic


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key pairs ``ours`` and ``other``."""
    pytest.importorskip("securesystemslib")
    from bench.certificate.envelope import keygen

    folder = tmp_path_factory.mktemp("keys")
    keygen(folder / "ours")
    keygen(folder / "other")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What stands for an exported folder."""
    made = tmp_path / "export"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"graph" * 100)
    (made / "sub" / "weights.bin").write_bytes(bytes(range(256)))
    return made


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for a checkpoint."""
    made = tmp_path_factory.mktemp("baseline")
    for name in ("config.json", "tokenizer.json"):
        (made / name).write_text(json.dumps({"name": name}))
    save_file({"weight": np.zeros(1, np.float32)}, made / "model.safetensors")
    return made


@pytest.fixture(scope="session")
def result_of() -> Callable[..., Validation]:
    """``result_of(folder, baseline, **changes)``: a good result of the two, int4 and short unless asked otherwise."""
    made = cache(synthetic)

    def get(
        folder: Path, baseline: Path, precision: str = "int4", mode: str = "standard", tokens: int = 20, **changes: Any
    ) -> Validation:
        digests = {
            "folder_sha256": folder_digest(hash_folder(folder)),
            "baseline_sha256": baseline_digest(hash_baseline(baseline)),
        }
        return made(precision, mode, tokens).model_copy(update=digests | changes)

    return get


@pytest.fixture
def kept_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task metrics of equal evidence are computed once: their bootstrap is most of a replay."""
    kept: dict[tuple[str, str], TaskMetric] = _KEPT
    real = judge.task_metric

    def task_metric(e: TaskEvidence, tier: Tier) -> TaskMetric:
        key = (e.model_dump_json(), tier.name)
        if key not in kept:
            kept[key] = real(e, tier)
        return kept[key]

    monkeypatch.setattr(judge, "task_metric", task_metric)


_KEPT: dict[tuple[str, str], TaskMetric] = {}
