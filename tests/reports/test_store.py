"""The history: one file, no doubles, no mixing of machines, and steps that are found where they are."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from reports.case_files import read_any
from reports.store import Point, Store, StoreError, find_steps, points_of
from tests.reports.comparison_examples import example_comparison


def point(k: int, value: float = 0.02, fingerprint: str = "here") -> Point:
    return Point(
        fingerprint, "model", "b1", "tpot", "s", f"2026-11-{k + 1:02d}T00:00:00+00:00", value, f"n{k}", f"r{k}"
    )


def test_points_are_kept_once_and_come_back_in_time(tmp_path: Path):
    with Store(tmp_path / "deep" / "h.sqlite") as store:
        assert store.add([point(2), point(1)]) == 2
        assert store.add([point(1), point(3)]) == 1
        assert [p.run for p in store.points()] == ["r1", "r2", "r3"]
    with Store(tmp_path / "deep" / "h.sqlite") as store:
        assert len(store.points()) == 3


def test_export_and_import_are_one_round(tmp_path: Path):
    with Store(tmp_path / "a.sqlite") as a, Store(tmp_path / "b.sqlite") as b:
        a.add([point(k, 0.02 + k / 1000) for k in range(5)])
        lines = list(a.export())
        assert b.load(lines, "x.jsonl") == 5
        assert b.load(lines, "x.jsonl") == 0
        assert b.points() == a.points()
        with pytest.raises(StoreError, match=r"x\.jsonl, line 2"):
            b.load([lines[0].replace("r0", "new"), '{"value": 1}'], "x.jsonl")
        with pytest.raises(StoreError, match="line 1"):
            b.load([lines[0].replace('"value": 0.02', '"value": -1')], "x.jsonl")
        assert len(b.points()) == 5  # all or nothing


def test_another_machines_past_is_refused_unless_asked_for(tmp_path: Path):
    with Store(tmp_path / "h.sqlite") as store:
        store.add([point(k, fingerprint="there") for k in range(3)])
        with pytest.raises(StoreError, match="--any-machine"):
            store.history("b1", "tpot", "here")
        found = store.history("b1", "tpot", "here", any_machine=True)
        assert found is not None
        assert len(found.points) == 3
        store.add([point(9)])
        own = store.history("b1", "tpot", "here")
        assert own is not None
        assert [p.run for p in own.points] == ["r9"]
        assert store.history("b1", "ttft", "here") is None


def test_a_file_that_is_no_history_is_refused(tmp_path: Path):
    path = tmp_path / "h.sqlite"
    path.write_text("not a database, and long enough to be looked at" * 50)
    with pytest.raises(StoreError, match="is no history"):
        Store(path)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer version"):
        Store(newer)


def test_points_are_medians_of_undisturbed_records(tmp_path: Path):
    made = example_comparison()
    path = tmp_path / "comparison.json"
    path.write_text(made.to_json())
    records, at, run = read_any(path, side="candidate"), made.created_utc, "run"
    assert {r.side for r in records} == {"candidate"}
    found = points_of(records, at, run, "label")
    assert ("b1-p128-n32", "tpot") in {(p.case_name, p.metric) for p in found}
    assert {p.case_name for p in found} == {"b1-p128-n32", "b1-p512-n32", "b4-p128-n32", "b8-p128-n32", "b1-p1024-n32"}
    single = points_of([r for r in records if r.outcome != "ok"], at, run)
    assert single == []
    with pytest.raises(StoreError, match="names no machine"):
        points_of([records[0].model_copy(update={"fingerprint": None})], at, run)


def test_a_step_is_found_at_its_place_and_noise_is_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 40)
    level = np.where(np.arange(40) < 22, 1.0, 1.05)
    (step,) = find_steps((0.02 * level * np.exp(noise)).tolist())
    assert abs(step.index - 22) <= 1
    assert step.ratio == pytest.approx(1.05, abs=0.01)
    assert step.p <= 0.01
    two = np.where(np.arange(60) < 20, 1.0, np.where(np.arange(60) < 40, 1.1, 1.0))
    assert [round(s.index, -1) for s in find_steps((two * np.exp(rng.normal(0, 0.01, 60))).tolist())] == [20, 40]


def test_one_wild_night_is_no_step_and_few_points_have_none():
    values = [1.0, 1.01, 0.99, 1.0, 1.02, 3.0, 1.0, 0.98, 1.01, 1.0, 0.99, 1.0]
    assert find_steps(values) == []
    assert find_steps([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]) == []


def test_unchanged_series_rarely_show_a_step():
    rng = np.random.default_rng(1)
    alarms = sum(bool(find_steps(rng.normal(1, 0.02, 30).tolist(), seed=k)) for k in range(200))
    assert alarms / 200 <= 0.03


def test_labels_are_data(tmp_path: Path):
    with Store(tmp_path / "h.sqlite") as store:
        hostile = point(1)._replace(label="'); DROP TABLE points; --")
        store.add([hostile])
        assert store.points() == [hostile]


def test_a_past_is_of_one_unit(tmp_path: Path):
    with Store(tmp_path / "h.sqlite") as store:
        one = point(1)
        store.add([one, point(2)._replace(value=1e3 * one.value, unit="ms")])
        assert [(p.value, p.unit) for p in store.points()] == [(pytest.approx(one.value), "s")] * 2
        store.add([point(k)._replace(metric="ticks", unit=unit) for k, unit in enumerate(("beats", "steps"))])
        with pytest.raises(StoreError, match="several units: 'beats', 'steps'"):
            store.history(one.case_name, "ticks", one.fingerprint)
