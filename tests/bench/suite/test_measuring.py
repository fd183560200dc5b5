"""What is measured of a side is measured as it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.deployment import Deployment
from bench.latency.workload import Profile, choose_profile
from bench.peers.optimum_ort import LABEL as OPTIMUM
from bench.suite import measuring
from bench.suite.measuring import Measuring
from reports.record import Case, Memory

Paths = Callable[..., Path]


@pytest.fixture
def smallest() -> Profile:
    """One short case."""
    return choose_profile("smoke", [1], [4], 2, 160)


def measured(folder: Path, checkpoint: Path, where: Deployment, profile: Profile) -> Measuring:
    baseline = SimpleNamespace(checkpoint=checkpoint)
    manifest = SimpleNamespace(activations="fp32")
    subject = SimpleNamespace(folder=folder, deployment=where, manifest=manifest, baseline=baseline)
    return Measuring(cast(Any, subject), profile)


def test_peak_memory_is_that_of_the_deployment(
    exports: Paths, checkpoints: Paths, smallest: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Deployment("cpu", 1, {"use_arena": "0"}, {"session.intra_op.allow_spinning": "0"}, True)
    asked: list[Deployment] = []

    def noted(label: str, case: Case, kind: str, path: Path, precision: str, where: Deployment) -> Memory:
        asked.append(where)
        return Memory(side=label, peak_bytes=2, baseline_bytes=1, case=case)

    monkeypatch.setattr(measuring, "peak_memory", noted)
    run = measured(exports(), checkpoints(), where, smallest)
    for side in (run.candidate, run.baseline):
        run.memory_of(side)
    assert asked == [where, where]


def test_peak_memory_where_the_provider_falls_back(exports: Paths, checkpoints: Paths, smallest: Profile) -> None:
    where = Deployment("cuda", 1, allow_fallback=True)
    run = measured(exports(), checkpoints(), where, smallest)
    for side in (run.candidate, run.baseline):
        found = run.memory_of(side)
        assert found.peak_bytes > found.baseline_bytes > 0


@pytest.mark.parametrize("why", ["", "cannot import name 'X'"])
def test_optimum_takes_part_or_is_left_out_with_its_reason(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from export import optimum_adapter

    monkeypatch.setattr(optimum_adapter, "IMPORT_ERROR", why)
    manifest = SimpleNamespace(precision="fp32", attention="GroupQueryAttention")
    subject = SimpleNamespace(manifest=manifest, deployment=Deployment("cpu", 1))
    run = Measuring(cast(Any, subject), choose_profile("standard", [1], [4], 2, 160))
    assert (OPTIMUM in run.labels()) == (OPTIMUM not in run.peers.skipped) == (not why)
    assert why in run.peers.skipped.get(OPTIMUM, "")
