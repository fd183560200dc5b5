"""The runtime on the CPU: what is counted as Python's, what the profile adds up, which limits are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.studies import cpu_runtime
from bench.studies.cpu_runtime import Measurements, long_and_wide, profile, python_share
from runtime.ort_session import OrtSession


def test_a_limit_is_held_from_its_own_side() -> None:
    measured = Measurements()
    measured.add("at most, kept", [1.0, 1.1, 9.0], 1.1)
    measured.add("at most, missed", [1.2], 1.1)
    measured.add("at least, kept", [3.4], 3.3, at_most=False)
    measured.add("at least, missed", [3.2], 3.3, at_most=False)
    measured.add("at least, just kept", [3.3], 3.3, at_most=False)
    measured.add("no limit", [5.0])
    assert [f.status for f in measured.metrics] == ["MET", "MISSED", "MET", "MISSED", "MET", "shown"]
    assert measured.metrics[0].value == 1.1


def test_pythons_share_is_what_lies_outside_run(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = session._decode
    before = graph.session
    monkeypatch.setattr(cpu_runtime, "PROMPT", 8)
    step = session.step

    def slow(ids: list[int]) -> Any:
        time.sleep(0.01)
        return step(ids)

    monkeypatch.setattr(session, "step", slow)
    assert python_share(session, steps=6) > 0.5
    monkeypatch.setattr(session, "step", step)

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(before, name)

        def run_with_iobinding(self, *arguments: Any) -> None:
            time.sleep(0.02)
            before.run_with_iobinding(*arguments)

    slowed = graph.session = Slow()
    assert python_share(session, steps=6) < 0.5
    assert graph.session is slowed
    graph.session = before


def test_the_profile_names_every_operator_once_a_layer(exports: Callable[..., Path]) -> None:
    found = profile(exports(), threads=1, context=8, steps=6)
    assert found["GroupQueryAttention"][1] == 2
    assert found["MatMul"][1] == 2 * 5 + 1
    kernels = sum(us for name, (us, _) in found.items() if name != "whole")
    assert 0 < kernels <= found["whole"][0]


def test_a_prefill_is_profiled_by_its_own_runs(exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    for name in ("prefill", "step"):
        own = getattr(OrtSession, name)

        def noted(self: Any, ids: Any, *more: Any, own: Any = own, name: str = name, **named: Any) -> Any:
            calls.append((name, len(ids)))
            return own(self, ids, *more, **named)

        monkeypatch.setattr(OrtSession, name, noted)
    found = profile(exports(), threads=1, batch=3, context=8, prefill=True, steps=6)
    assert calls == [("prefill", 3)] * 6
    assert (found["GroupQueryAttention"][1], found["whole"][1]) == (2, 1)


def test_long_and_wide_prefill_and_step(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runtime, "PROMPT", 8)
    monkeypatch.setattr(cpu_runtime, "LONG", 32)
    monkeypatch.setattr(cpu_runtime, "VOCAB", 60)
    measured = Measurements()
    long_and_wide(session, measured, 2)
    assert [f.name.split(",")[0] for f in measured.metrics] == [
        "time per token at context 2",
        "batch 4 decode",
        "batch 4 prefill",
    ]
    assert all(f.value > 0 for f in measured.metrics)
