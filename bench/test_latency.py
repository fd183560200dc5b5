"""Latency: prefill (TTFT), decode (TPOT), end to end and load, ONNX Runtime beside PyTorch.

Every case is measured once, all sides interleaved; each test shows one side's samples. Nothing is asserted about
speed here: a timed assertion on a noisy machine cries wolf. The report judges ratios with their intervals.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.latency.replay import CLOCK, replay
from bench.suite.run import Run
from reports.record import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_prefill(run: Run, benchmark: Any, prefill_case: Case, side: str) -> None:
    series = run.measuring.series_of(prefill_case, side)
    samples = [r.ttft_s for r in series.rounds]
    assert min(samples) > 0
    title, case = f"prefill (TTFT), {prefill_case.label}", prefill_case.model_dump()
    replay(benchmark, samples, title, side=side, case=case, unit="s")


def test_decode(run: Run, benchmark: Any, case: Case, side: str) -> None:
    series = run.measuring.series_of(case, side)
    samples = [t for r in series.rounds if (t := r.tpot_s) is not None]
    assert all(len(r.at_s) == case.new_tokens for r in series.rounds)
    gaps = [r.gaps_s for r in series.rounds]
    replay(benchmark, samples, f"decode (TPOT), {case.label}", side=side, case=case.model_dump(), gaps_s=gaps)


def test_end_to_end(run: Run, benchmark: Any, case: Case, side: str) -> None:
    series = run.measuring.series_of(case, side)
    samples = [r.total_s for r in series.rounds]
    assert all(r.total_s >= r.ttft_s for r in series.rounds)
    replay(benchmark, samples, f"end to end, {case.label}", side=side, case=case.model_dump(), unit="s")


def test_load(run: Run, benchmark: Any, side: str) -> None:
    samples = run.measuring.load_of(side).samples_s
    assert min(samples) > 0
    replay(benchmark, samples, "load", side=side, unit="s")
