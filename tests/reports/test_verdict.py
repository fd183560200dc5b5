"""The verdict's truth table, and every way in which a part of a run can be missing."""

from __future__ import annotations

import itertools

import pytest

from reports.record import Case
from reports.summary import floor_rows, floor_s, gap_rows, headline_case, latency_rows
from reports.validation import Evidence, decide_verdict, overall
from reports.verdict import judge, parity_answer, speed_sentence
from tests.reports.validation_examples import example_validation

STATUSES = ("PASS", "FAIL", "INCONCLUSIVE", "REPORTED", "SUSPICIOUS", "SKIPPED")
EVERY = [chosen for n in range(len(STATUSES) + 1) for chosen in itertools.combinations(STATUSES, n)]


def _expected(statuses):
    """The rule, written down independently of the code."""
    if any(s == "FAIL" for s in statuses):
        return "FAIL", "different", 1
    if any(s == "INCONCLUSIVE" for s in statuses):
        return "INCONCLUSIVE", "undecided", 3
    if {"PASS", "SUSPICIOUS"} & set(statuses):
        return "PASS", "same", 0
    return "INCONCLUSIVE", "undecided", 3


def test_truth_table_of_the_verdict():
    for statuses in EVERY:
        validation = example_validation(statuses=statuses)
        word, answer, code = _expected(statuses)
        assert (overall(statuses), validation.verdict) == (word, word)
        assert (parity_answer(validation), validation.exit_code) == (answer, code)
    assert parity_answer(None) == "not examined"


def test_reasons_name_the_checks_that_decided():
    assert decide_verdict([]) == ("INCONCLUSIVE", ["no check could judge anything"])
    assert example_validation(statuses=["FAIL", "INCONCLUSIVE", "PASS"]).reasons == ["c0: 10 files as published"]
    assert example_validation(statuses=["INCONCLUSIVE", "PASS"]).reasons == ["c0: 10 files as published"]
    assert example_validation().reasons == ["17 checks passed", "suspicious though inside their margins: tail_kld"]
    assert example_validation(failing="weights").reasons == [
        "weights: model.layers.3.mlp.up_proj.weight: 6 of 884,736 values differ (and 4 more)"
    ]


@pytest.mark.parametrize(
    "statuses",
    [
        ["PASS"],
        ["FAIL", "PASS"],
        ["INCONCLUSIVE", "PASS"],
        ["FAIL", "INCONCLUSIVE"],
        ["REPORTED"],
        ["SUSPICIOUS"],
        [],
    ],
)
def test_exit_code_follows_parity(make_record, statuses):
    verdict = judge(make_record(statuses=statuses))
    assert (verdict.outcome, verdict.parity, verdict.exit_code) == _expected(statuses)
    assert verdict.word == {0: "PASSED", 1: "FAILED", 3: "INCONCLUSIVE"}[verdict.exit_code]


def test_the_lists_name_their_checks(make_record):
    verdict = judge(make_record(failing_check=True))
    assert verdict.failed == ("Mean KL divergence",)
    assert verdict.suspicious == ("99.9 % KL divergence",)
    assert (verdict.passed, verdict.gated) == (16, 17)
    assert verdict.headline.startswith("Different model, ")


@pytest.mark.parametrize("outcome", ["failed", "error"])
def test_a_failed_test_fails_the_run(make_record, outcome):
    outcomes = [{"test": "t.py::x", "outcome": outcome, "seconds": 1, "message": "m"}]
    verdict = judge(make_record(outcomes=outcomes))
    assert (verdict.exit_code, verdict.parity, verdict.failed_tests) == (1, "same", ("t.py::x",))
    assert "1 test failed" in verdict.headline
    assert judge(make_record(outcomes=outcomes, parity=False)).exit_code == 1


def test_a_check_that_failed_is_not_a_failed_test_as_well(make_record):
    tests = ("test_check[mean_kld]", "test_check[unknown]", "t.py::x")
    outcomes = [{"test": t, "outcome": "failed", "seconds": 1, "message": "m"} for t in tests]
    verdict = judge(make_record(outcomes=outcomes, failing_check=True))
    assert verdict.failed == ("Mean KL divergence",)
    # A test without a result in the validation is the only one to tell that something broke.
    assert verdict.failed_tests == tests[1:]
    assert judge(make_record(outcomes=outcomes, parity=False)).failed_tests == tests


def test_missed_targets_are_listed_and_do_not_fail(make_record):
    verdict = judge(make_record())
    assert [t.name for t in verdict.targets if not t.met] == ["decode over the memory floor"]
    assert "1 of 4 targets missed" in verdict.headline
    assert verdict.exit_code == 0


def test_headline_case_is_smallest_batch_then_nearest_128(make_record):
    record = make_record()
    assert headline_case(record) == Case(batch=1, prompt=128, new_tokens=48)
    without = [s for s in record.series if s.case.prompt != 128]
    assert headline_case(make_record(series=without)).prompt == 32
    # One that the baseline did not run answers nothing.
    lame = [s for s in record.series if s.case.prompt != 128 or s.case.batch != 1 or s.side != "pytorch"]
    assert headline_case(make_record(series=lame)).prompt == 32


def test_speed_is_baseline_over_candidate(make_record):
    speed = judge(make_record()).speed
    assert speed["decode"].speedup.value == pytest.approx(2.86, abs=0.05)
    assert speed["prefill"].speedup.low < speed["prefill"].speedup.value < speed["prefill"].speedup.high
    assert speed_sentence(speed).startswith("2.86 times as fast (95 % interval 2.8")


def test_speed_not_measured_without_a_baseline(make_record):
    verdict = judge(make_record(single_side=True))
    assert verdict.speed == {}
    assert "speed not measured" in verdict.headline
    assert "speed against a baseline" in verdict.not_examined


def test_one_new_token_leaves_decode_unmeasured(make_record):
    series = [s.model_dump() for s in make_record().series]
    for s in series:
        s["case"]["new_tokens"] = 1
        for r in s["rounds"]:
            r["at_s"] = r["at_s"][:1]
    verdict = judge(make_record(series=series))
    assert set(verdict.speed) == {"prefill"}


def test_what_was_not_examined_is_said(make_record):
    verdict = judge(make_record(bare=True))
    assert (verdict.parity, verdict.exit_code, verdict.rounds, verdict.tokens_scored) == (
        "not examined",
        3,
        0,
        None,
    )
    for part in ("parity with PyTorch", "speed against a baseline", "memory", "load time", "memory floor"):
        assert part in verdict.not_examined
    assert "latency beyond 1,072 of 8,192 tokens of context" in judge(make_record()).not_examined


def test_noise_few_rounds_and_random_weights_warn(make_record):
    quiet = judge(make_record())
    assert quiet.warnings == ("Turbo boost could not be read.",)
    assert any("above 2.5 %" in w for w in judge(make_record(noise=0.08)).warnings)
    few = judge(make_record(rounds=5)).warnings
    assert any("Fewer than 6 rounds" in w and "PyTorch eager (5)" in w for w in few)
    assert not any("Fewer than 6" in w for w in judge(make_record(rounds=6)).warnings)
    random = judge(make_record(random_weights=True))
    assert random.headline.startswith("Random weights: same model")
    assert any("weights are random" in w for w in random.warnings)


def test_uneven_rounds_and_broken_clocks_warn(make_record):
    series = [s.model_dump() for s in make_record().series]
    series[0]["rounds"].pop()
    series[1]["rounds"][0]["at_s"][0] = 0.0
    found = " ".join(judge(make_record(series=series)).warnings)
    assert "batch 1, prompt 32: sides have 11 to 12 rounds" in found
    assert "PyTorch eager: a time that is not positive" in found


def test_tokens_scored_are_those_of_the_evidence(make_record):
    validation = make_record().validation
    assert judge(make_record()).tokens_scored == 2040
    assert judge(make_record(validation=validation.model_copy(update={"evidence": Evidence()}))).tokens_scored == 0


def test_checks_left_out_or_not_judged_are_said(make_record):
    assert "checks" not in " ".join(judge(make_record()).not_examined)
    validation = example_validation(left_out=3)
    results = [r.model_copy(update={"status": "SKIPPED"}) if r.name == "graph" else r for r in validation.results]
    found = judge(make_record(validation=validation.model_copy(update={"results": results}))).not_examined
    assert found[:2] == ("3 of 18 checks", "not judged: graph")


def test_rows_derive_from_raw_samples(make_record):
    record = make_record()
    rows = latency_rows(record)
    assert len(rows) == 5 * 4
    batched = next(r for r in rows if r.case.batch == 4 and r.side.label == "onnx")
    assert batched.tokens_per_s == pytest.approx(4 / batched.times["tpot"].value)
    baseline = next(r for r in rows if r.side.role == "baseline")
    assert baseline.gains["tpot"] is None
    gaps = {r.side.label: r for r in gap_rows(record, headline_case(record))}
    assert gaps["onnx"].n == 12 * 47
    assert gaps["onnx"].p95 is not None
    assert gaps["onnx"].p99 is None


def test_floor_is_bytes_over_median_bandwidth_at_the_mean_context(make_record):
    record = make_record()
    case = headline_case(record)
    expected = (538_000_000 + (128 + 24) * 46_080) / 30.1e9
    assert floor_s(record, case) == pytest.approx(expected)
    # 12 rounds and 3 samples: held against the median.
    row = floor_rows(record, case)[0]
    assert row.multiple.value == pytest.approx(row.tpot.value / expected)
    assert floor_rows(make_record(floor=False), case) == []
    four = Case(batch=4, prompt=128, new_tokens=48)
    assert floor_s(record, four) - floor_s(record, case) == pytest.approx(3 * (128 + 24) * 46_080 / 30.1e9)


def test_a_round_is_held_against_the_bandwidth_beside_it(make_record):
    """Twice as slow a bus makes a step twice as slow: the multiple stays, whatever the medians say."""
    record = make_record()
    case = headline_case(record)
    tpots = [r.tpot_s for r in record.find(case, "onnx").rounds]
    # 1.2 times the floor in every round, on a bus that drifts.
    speeds = [1.2 * record.floor.step_bytes(case) / t for t in tpots[:8]]
    speeds += [1.2 * record.floor.step_bytes(case) / t * 0.3 for t in tpots[8:]]
    slowed = [s.model_dump() for s in record.series]
    for s in slowed:
        if Case(**s["case"]) == case and s["side"] == "onnx":
            for r in s["rounds"][8:]:
                r["at_s"] = [t / 0.3 for t in r["at_s"]]
    floor = record.floor.model_dump() | {"bandwidth_samples": speeds}
    row = floor_rows(make_record(series=slowed, floor=floor), case)[0]
    assert (row.multiple.low, row.multiple.value, row.multiple.high) == pytest.approx((1.2, 1.2, 1.2))
