"""Record files from here and elsewhere, judged in pairs or as advice."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from reports.case_files import from_pytest_benchmark, from_run_record, read_any, read_records
from reports.compare import Rules
from reports.comparison import CaseRecord, Comparison
from reports.errors import RecordError
from reports.render.comparison_html import render_comparison
from reports.render.comparison_junit import render_comparison_junit
from reports.render.comparison_markdown import render_comparison_markdown
from reports.render.comparison_terminal import print_comparison
from reports.render.validation import (
    print_validation,
    render_validation,
    render_validation_junit,
    render_validation_markdown,
)
from reports.unpaired import compare_files, judge_unpaired, welch
from tests.reports.comparison_examples import example_comparison
from tests.reports.validation_examples import example_validation


def lines(path: Path, records: list[CaseRecord]) -> Path:
    path.write_text("".join(r.model_dump_json(exclude_defaults=False) + "\n" for r in records))
    return path


def foreign(name: str, values: list[float], **more: Any) -> CaseRecord:
    return CaseRecord(schema_version=1, case=name, metrics={"time": values}, units={"time": "s"}, **more)


def in_pairs(metric: str = "tpot", base: float = 0.02, ratio: float = 1.0, pairs: int = 10) -> list[CaseRecord]:
    """An interleaved run of one case."""
    rng = np.random.default_rng(1)
    sides = (("base", base), ("candidate", base * ratio))
    return [
        CaseRecord(
            schema_version=1,
            case="c",
            run="r",
            pair=k,
            side=side,  # type: ignore[arg-type]
            metrics={metric: [level * math.exp(rng.normal(0, 0.004))]},
            units={metric: "s"},
        )
        for k in range(pairs)
        for side, level in sides
    ]


def noisy(name: str, level: float, processes: int = 8, seed: int = 0) -> list[CaseRecord]:
    rng = np.random.default_rng(seed)
    return [foreign(name, (level * np.exp(rng.normal(0, 0.005, 5))).tolist()) for _ in range(processes)]


def judged(tmp_path: Path, base: list[CaseRecord], candidate: list[CaseRecord]) -> Comparison:
    files = lines(tmp_path / "a.jsonl", base), lines(tmp_path / "b.jsonl", candidate)
    return compare_files(read_any(files[0], side="base"), read_any(files[1], side="candidate"))


def test_enough_processes_made_elsewhere_fail_a_pipeline(tmp_path: Path):
    """Five or more processes a side: a change far beyond the margin is one, and the page says that it is unpaired."""
    base, slow = noisy("parse", 1.0), noisy("parse", 1.1, seed=1)
    made = judged(tmp_path, base, slow)
    assert [r.status for r in made.results] == ["REGRESSION"]
    assert (made.verdict.outcome, made.verdict.exit_code) == ("FAIL", 1)
    assert (made.paired, made.advisory) == (False, False)
    assert any(w.startswith("unpaired: ") for w in made.warnings)
    for page in (render_comparison(made), render_comparison_markdown(made)):
        assert "not measured in interleaved pairs" in page
        assert "Nothing here gates" not in page
    assert made.family.gating_metrics == ["time"]
    assert judged(tmp_path, slow, base).results[0].status == "IMPROVED"
    assert judged(tmp_path, base, base).verdict.exit_code == 0
    lost = judged(tmp_path, base + noisy("only base", 1.0), base + noisy("only candidate", 1.0))
    assert {r.case: r.status for r in lost.results} == {
        "parse": "EQUIVALENT",
        "only base": "MISSING",
        "only candidate": "NEW",
    }
    assert lost.verdict.exit_code == 1  # it was measured, and is no longer


def test_an_unpaired_change_near_the_margin_may_be_the_hours(tmp_path: Path):
    made = judged(tmp_path, noisy("parse", 1.0), noisy("parse", 1.031, seed=2))
    (result,) = made.results
    assert result.p_holm is not None
    assert result.p_holm < 0.001
    assert result.ratio is not None
    assert result.ratio > 1.03
    assert result.status == "INCONCLUSIVE"
    assert "not surely beyond the margin (p = " in result.reason
    console = Console(width=200, file=io.StringIO())
    print_comparison(made, console)
    assert "undecided: time of parse: ratio 1.03" in console.file.getvalue()  # type: ignore[attr-defined]
    assert made.verdict.exit_code == 3


@pytest.mark.parametrize("level", [1.0, 1.5])
def test_too_few_processes_decide_nothing(level: float, tmp_path: Path):
    """Rounds of one process are no samples of the process: whatever they show is inconclusive, with the reason."""
    for processes, count in ((1, "1 process on a side"), (4, "4 processes on a side")):
        made = judged(tmp_path, noisy("parse", 1.0), noisy("parse", level, processes, seed=1))
        assert [r.status for r in made.results] == ["INCONCLUSIVE"]
        assert count in made.results[0].reason
        assert "5 or more processes a side decide" in made.verdict.reasons[0]
        assert made.verdict.exit_code == 3
        assert made.advisory
        assert "interleaved" in made.advisory_reason


def test_records_of_two_machines_are_advice(tmp_path: Path):
    here, there = (
        [r.model_copy(update={"fingerprint": f}) for r in noisy("parse", level, seed=seed)]
        for f, level, seed in (("a", 1.0, 0), ("b", 1.5, 1))
    )
    made = judged(tmp_path, here, there)
    assert made.advisory
    assert made.verdict.exit_code == 3
    assert "different machines" in made.results[0].reason
    missing = judged(tmp_path, here + noisy("gone", 1.0), there)
    assert missing.verdict.exit_code == 3  # advice never fails a pipeline


def test_unpaired_families_cry_wolf_seldom_even_at_another_hour():
    """40 unchanged cases, 8 processes a side, 1.5 % process noise, the second file 3 % slower by the hour alone."""
    rng = np.random.default_rng(20)

    def side(name: str, hour: float, slow: float = 0.0) -> list[CaseRecord]:
        return [
            foreign(f"c{c}", [float(np.exp(rng.normal(hour + slow * (c == 0), 0.015)))]).model_copy(
                update={"side": name}
            )
            for c in range(40)
            for _ in range(8)
        ]

    families = 60
    alarms = found = 0
    for _ in range(families):
        drifted, _family = judge_unpaired(side("base", 0), side("candidate", np.log(1.03)), Rules())
        alarms += any(r.status == "REGRESSION" for r in drifted)
        changed, _family = judge_unpaired(side("base", 0), side("candidate", 0, np.log(1.10)), Rules())
        found += changed[0].status == "REGRESSION"
        assert not any(r.status == "REGRESSION" for r in changed[1:])
    print(f"alarms {alarms}, found {found} of {families}")
    assert alarms <= 0.05 * families
    assert found >= 0.9 * families


def test_files_of_one_interleaved_run_are_judged_in_pairs(tmp_path: Path):
    records = [r for r in example_comparison().records if r.case == "b1-p128-n32"]
    base = lines(tmp_path / "a.jsonl", [r for r in records if r.side == "base"])
    candidate = lines(tmp_path / "b.jsonl", [r for r in records if r.side == "candidate"])
    made = compare_files(read_any(base, side="base"), read_any(candidate, side="candidate"))
    assert made.paired
    assert not made.advisory
    assert {r.metric: len(r.pairs) for r in made.results} == {"ttft": 10, "tpot": 10, "total": 10}
    # A whole run's file as either side gives that side.
    both = lines(tmp_path / "both.jsonl", records)
    assert {r.side for r in read_any(both, side="base")} == {"base"}
    assert len(read_any(both, side="base")) == 10


def test_times_in_other_units_are_kept_in_seconds(tmp_path: Path):
    """A base of 20 ms against a candidate of 0.02 s is no change, and not 99.9 % faster."""
    slow = [r.model_dump() | {"units": {"time": "ms"}} for r in noisy("parse", 20.0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in slow))
    base = read_any(tmp_path / "a.jsonl", side="base")
    assert base[0].metrics["time"][0] == pytest.approx(slow[0]["metrics"]["time"][0] / 1000)
    made = compare_files(base, noisy("parse", 0.02, seed=1))
    assert [(r.status, r.unit) for r in made.results] == [("EQUIVALENT", "s")]
    assert made.results[0].ratio == pytest.approx(1, abs=0.01)
    size = CaseRecord(schema_version=1, case="c", metrics={"peak_memory": [2]}, units={"peak_memory": "MiB"})
    assert (size.metrics["peak_memory"], size.units) == ([2 * 2**20], {"peak_memory": "B"})


@pytest.mark.parametrize(
    ("metric", "unit", "words"),
    [("ttft", "B", "ttft cannot be in 'B'; give it in s"), ("speed", "tokens/s", "speed is a rate")],
)
def test_a_unit_that_cannot_be_compared_is_refused(metric: str, unit: str, words: str, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"schema_version": 1, "case": "c", "metrics": {metric: [1]}, "units": {metric: unit}}))
    with pytest.raises(RecordError, match=f"line 1: {words}"):
        read_records(path)


def test_two_units_of_one_metric_are_refused():
    bare = [r.model_copy(update={"units": {}}) for r in noisy("parse", 1.0)]
    with pytest.raises(RecordError, match="time of parse has 's' in one record and no unit in another"):
        compare_files(noisy("parse", 1.0), bare)
    mixed = in_pairs("ticks")
    with pytest.raises(RecordError, match="ticks of c has 's'"):
        compare_files(
            [r for r in mixed if r.side == "base"],
            [r.model_copy(update={"units": {"ticks": "beats"}}) for r in mixed if r.side == "candidate"],
        )


@pytest.mark.parametrize("value", [math.inf, math.nan, True, "0.02", 0, -1, None])
def test_only_a_positive_number_is_a_time(value: object, make_record: Any, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"schema_version": 1, "case": "x", "metrics": {"t": [value]}}))
    with pytest.raises(RecordError, match=r"line 1: metrics\.t\.0: Input should be"):
        read_any(path, side="base")
    with pytest.raises(RecordError, match=r"metrics\.time\.0: Input should be"):
        from_pytest_benchmark(benchmark_json(stats={"data": [value]}), path)
    if value != 0:
        raw = json.loads(make_record().to_json())
        raw["series"][0]["rounds"][0]["at_s"][0] = value
        path.write_text(json.dumps(raw))
        with pytest.raises(RecordError, match=r"at_s\.0: Input should be"):
            read_any(path, side="base")


def test_one_process_counts_once(tmp_path: Path):
    """A file three times over is no more processes, and the later of two records of a place is not dropped."""
    one = noisy("parse", 1.0, processes=2)
    path = lines(tmp_path / "a.jsonl", one * 3)
    with pytest.raises(RecordError, match=r"a.jsonl, record 3 \(parse\) is the same record as .*a.jsonl, record 1, "):
        read_any(path, side="base")
    path = lines(tmp_path / "b.jsonl", one)
    with pytest.raises(RecordError, match=r"b.jsonl, record 1 \(parse\) is the same record as"):
        read_any(path, path, side="base")
    base = [r for r in in_pairs() if r.side == "base"]
    slow = base[0].model_copy(update={"metrics": {"tpot": [9.0]}})
    with pytest.raises(RecordError, match=r"record 2 .* is of the same case, pair and attempt as .*record 1"):
        read_any(lines(tmp_path / "c.jsonl", [slow, *base]), side="base")
    again = slow.model_copy(update={"attempt": 1})
    assert len(read_any(lines(tmp_path / "d.jsonl", [again, *base]), side="base")) == 11


def test_records_of_the_other_side_are_refused(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", [r for r in in_pairs() if r.side == "candidate"])
    with pytest.raises(RecordError, match="holds records of the candidate alone and is passed as the base"):
        read_any(path, side="base")


def test_two_sweeps_of_one_file_were_not_interleaved(tmp_path: Path):
    """A sweep's run is the digest of its file: another day's has the same run and the same pairs."""
    sweep = [r.model_copy(update={"side": None}) for r in in_pairs() if r.side == "base"]
    assert not compare_files(sweep, sweep).paired
    elsewhere = [r.model_copy(update={"fingerprint": str(r.side)}) for r in in_pairs()]
    assert not compare_files(elsewhere[::2], elsewhere[1::2]).paired


@pytest.mark.parametrize("metric", ["parse_time", "total"])
def test_a_metric_of_another_name_gates_in_pairs_as_well(metric: str):
    records = in_pairs(metric, ratio=1.2)
    made = compare_files(records[::2], records[1::2])
    assert made.paired
    assert [(r.status, r.gating) for r in made.results] == [("REGRESSION", True)]
    assert (made.verdict.exit_code, made.family.gating_metrics) == (1, [metric])
    unpaired = compare_files(records[::2], records[1::2], Rules(gating=("ttft",)))
    assert unpaired.verdict.reasons == ["no gating metric was compared"]


def test_control_characters_of_names_reach_no_page():
    name = "a\x1b[31mb\x07\x00c\x9b\u202ed"
    made = example_comparison(hostile=name)
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    print_comparison(made, console)
    print_validation(example_validation(hostile=name), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    renderers = (render_comparison, render_comparison_markdown, render_comparison_junit)
    validation = example_validation(hostile=name)
    pages = [render(made) for render in renderers]
    pages += [r(validation) for r in (render_validation, render_validation_markdown, render_validation_junit)]
    for page in (*pages, printed):
        assert "\ufffd" in page
        assert not set(name) & set(page) & set("\x1b\x07\x00\x9b\u202e")


def test_welch_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 7), rng.normal(1, 3, 12)
    difference, error, df = welch(a, b)
    theirs = stats.ttest_ind(b, a, equal_var=False)
    assert difference / error == pytest.approx(theirs.statistic)
    assert df == pytest.approx(theirs.df)


def test_own_record_json_is_read(make_record, tmp_path: Path):
    record = make_record()
    path = tmp_path / "record.json"
    path.write_text(record.to_json())
    found = read_any(path, side="candidate")
    assert len(found) == len(record.cases())
    first = record.series[0]
    mine = next(r for r in found if r.parameters == first.case.model_dump())
    assert mine.metrics["ttft"] == [r.ttft_s for r in record.find(first.case, record.side("candidate").label).rounds]
    assert mine.fingerprint == record.machine.fingerprint
    assert from_run_record(record)[0].side is None


def benchmark_json(**more: Any) -> dict[str, Any]:
    one = {"name": "test_x", "fullname": "tests/test_x.py::test_x", "params": {"n": 3, "f": [1]}}
    return {
        "machine_info": {"node": "host", "cpu": {"brand_raw": "EPYC"}, "system": "Linux"},
        "benchmarks": [{**one, "stats": {"data": [0.1, 0.11, 0.12], "median": 0.11}, **more}],
    }


def test_pytest_benchmarks_json_is_read(tmp_path: Path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(benchmark_json()))
    (one,) = read_any(path, side="base")
    assert (one.case, one.metrics, one.parameters) == (
        "tests/test_x.py::test_x",
        {"time": [0.1, 0.11, 0.12]},
        {"n": 3},
    )
    assert one.fingerprint == "host|EPYC|Linux"
    bare = from_pytest_benchmark(benchmark_json(stats={"median": 0.2}), path)
    assert bare[0].metrics == {"time": [0.2]}
    with pytest.raises(RecordError, match="no name or no times"):
        from_pytest_benchmark(benchmark_json(stats={}), path)
    twice = benchmark_json()
    twice["benchmarks"] *= 6
    with pytest.raises(RecordError, match=r"holds tests/test_x.py::test_x twice, and a file is one process"):
        from_pytest_benchmark(twice, path)


@pytest.mark.parametrize(
    ("machine_info", "identity"),
    [
        ({"node": "host", "cpu": "EPYC", "system": "Linux"}, "host|EPYC|Linux"),
        ({"llama_onnx": {"fingerprint": "ab"}, "node": "host"}, "ab"),
        ({"cpu": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_machine_is_what_the_file_says_of_it(machine_info: object, identity: str | None, tmp_path: Path):
    raw = benchmark_json() | {"machine_info": machine_info}
    (one,) = from_pytest_benchmark(raw, tmp_path)
    assert one.fingerprint == identity


def test_a_file_that_names_no_machine_is_not_of_another_one(tmp_path: Path):
    raw = benchmark_json()
    del raw["machine_info"]
    made = compare_files(from_pytest_benchmark(benchmark_json(), tmp_path), from_pytest_benchmark(raw, tmp_path))
    assert made.warnings == ["records that do not say which machine they are of"]
    assert "machine" not in made.advisory_reason


@pytest.mark.parametrize(
    "broken", [{"machine_info": [1]}, {"benchmarks": [1]}, {"benchmarks": [{"name": "x", "stats": [1]}]}]
)
def test_a_broken_pytest_benchmark_file_is_named(broken: dict[str, Any], tmp_path: Path):
    with pytest.raises(RecordError, match=f"{tmp_path}: (machine_info|benchmarks)"):
        from_pytest_benchmark(benchmark_json() | broken, tmp_path)


def test_medians_without_rounds_are_too_few_and_not_disturbed(tmp_path: Path):
    def side(level: float) -> list[CaseRecord]:
        return from_pytest_benchmark(benchmark_json(stats={"median": level}), tmp_path)

    made = compare_files(side(0.2), side(0.3))
    assert [r.status for r in made.results] == ["INCONCLUSIVE"]
    assert made.results[0].reason.startswith("1 process on a side: ")
    assert "disturbed" not in render_comparison_markdown(made)


def test_real_pytest_benchmark_output_is_read(tmp_path: Path):
    import subprocess
    import sys

    (tmp_path / "test_it.py").write_text("def test_it(benchmark):\n    benchmark(sum, range(1000))\n")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "test_it.py", f"--benchmark-json={out}", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=5"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (one,) = read_any(out, side="base")
    assert one.case == "test_it.py::test_it"
    assert len(one.metrics["time"]) >= 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 1, "case": "x", "metrics": {"t": [1]}}\n{"schema', r"line 2 is not valid JSON"),
        ('{"schema_version": 7, "case": "x", "metrics": {}}\n', r"line 1 has case schema version 7"),
        ('{"schema_version": 1, "case": "x", "metrics": {"t": [-1]}}\n', r"line 1: metrics\.t\.0"),
        ("[1]\n", r"line 1 has case schema version None"),
    ],
)
def test_a_broken_line_is_named(text: str, words: str, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(RecordError, match=words):
        read_records(path)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecordError, match="holds no record"):
        read_any(tmp_path / "empty.jsonl", side="base")
    with pytest.raises(RecordError, match="cannot read"):
        read_any(tmp_path / "none.jsonl", side="base")
