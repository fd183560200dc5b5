"""The verdict's statistics, proved by simulation with fixed seeds: 1,000 families of 40 benchmarks each."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from bench.studies import simulate
from bench.studies.simulate import Scenario, main, order_of, run

DRIFT = {"drift": 0.03}
OUTLIERS = {"outliers": 0.01}


@pytest.mark.parametrize(
    "world",
    [{}, DRIFT, {**DRIFT, "shape": "wave"}, OUTLIERS, {**DRIFT, **OUTLIERS}],
    ids=["plain", "ramp", "wave", "outliers", "ramp and outliers"],
)
def test_unchanged_families_rarely_alarm(world):
    found = run(Scenario("unchanged", **world), families=1000)
    assert found.alarms <= 0.05
    assert found.passed >= 0.97  # and the gate lets them through: not by deciding nothing
    assert found.fixed > 0.25  # a fixed 5 % rule on the same data


@pytest.mark.parametrize("world", [{}, DRIFT, OUTLIERS, {**DRIFT, **OUTLIERS}])
def test_a_real_5_percent_slowdown_is_found_with_10_pairs(world):
    found = run(Scenario("slower", slow=1, change=0.05, **world), families=1000)
    assert found.found_planned >= 0.90
    assert found.found >= found.found_planned
    assert found.equivalent == 0
    assert found.alarms <= 0.05


@pytest.mark.parametrize("change", [0.03, 0.035])
def test_a_slowdown_at_or_beyond_the_margin_is_not_called_equivalent(change):
    found = run(Scenario("at the margin", slow=40, change=change, **DRIFT, **OUTLIERS), families=250)
    assert found.equivalent <= 0.05


@pytest.mark.parametrize("size", [1, 4, 12])
def test_small_families_hold_their_level_too(size):
    found = run(Scenario("small", size=size, uneven=0.5, noise=0.03), families=1500)
    assert found.alarms <= 0.05
    assert run(Scenario("small", size=size, slow=size, change=0.05), families=300).found >= 0.9


def test_both_looks_together_hold_the_level_that_one_look_would():
    # Noise so large that half of the family is extended, no margin to hide behind.
    noisy = Scenario("noisy", size=8, noise=0.06)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "MARGIN", 1e-9)
        found = run(noisy, families=1500)
    assert found.extended > 0.9
    assert found.alarms_planned < found.alarms <= 0.05


def test_order_is_balanced_in_every_two_pairs():
    rng = np.random.default_rng(1)
    orders = [order_of(rng, 10).tolist() for _ in range(20)]
    assert all(o[k] != o[k + 1] for o in orders for k in range(0, 10, 2))
    assert len({tuple(o) for o in orders}) > 10


def test_table_is_written_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(simulate, "UNCHANGED", (Scenario("quick"),))
    monkeypatch.setattr(simulate, "SLOWER", (Scenario("slow", slow=1, change=0.05),))
    monkeypatch.setattr(simulate, "AT_MARGIN", ())
    page = tmp_path / "statistics.md"
    page.write_text("before\n<!-- simulation -->\nold\n<!-- /simulation -->\nafter\n")
    said: list[str] = []
    main(["--families", "3", "--out", str(page)], said.append)
    text = page.read_text()
    assert text.startswith("before\n<!-- simulation -->\n| scenario |")
    assert text.endswith("<!-- /simulation -->\nafter\n")
    assert "old" not in text
    assert "| quick |" in said[0]


def test_scenarios_are_as_the_issue_asks():
    assert {s.size for s in simulate.UNCHANGED} == {40, 4}
    assert math.isclose(simulate.MARGIN, math.log(1.03))
    assert dataclasses.astuple(simulate.UNCHANGED[0])[1:3] == (40, 0.015)
