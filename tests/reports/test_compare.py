"""Records -> statuses: what counts, what is repeated, what is missing, and when a second look may decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reports import compare, paired
from reports.compare import Rules, judge, needs_extension, verdict_of
from reports.comparison import CaseRecord
from tests.reports.validation_examples import example_validation


def record(case: str, side: str, pair: int, tpot: float | None, **more: Any) -> CaseRecord:
    base: dict[str, Any] = {"schema_version": 1, "run": "r", "position": 0 if side == "base" else 1}
    metrics = {} if tpot is None else {"tpot": [tpot, tpot * 1.01, tpot * 0.99]}
    return CaseRecord(**{**base, "case": case, "side": side, "pair": pair, "metrics": metrics, **more})


def pairs(
    case: str, ratio: float, n: int = 10, noise: float = 0.004, start: int = 0, seed: int = 0
) -> list[CaseRecord]:
    rng = np.random.default_rng(seed)
    found = []
    for k in range(start, start + n):
        found.append(record(case, "base", k, 0.02))
        found.append(record(case, "candidate", k, 0.02 * ratio * math.exp(rng.normal(0, noise))))
    return found


def status(records: list[CaseRecord], rules: Rules | None = None) -> dict[str, str]:
    return {r.case: r.status for r in judge(records, rules).results}


def test_statuses_of_a_family():
    records = pairs("same", 1.0) + pairs("slow", 1.06, seed=1) + pairs("fast", 0.9, seed=2)
    judged = judge(records)
    assert {r.case: r.status for r in judged.results} == {
        "same": "EQUIVALENT",
        "slow": "REGRESSION",
        "fast": "IMPROVED",
    }
    assert judged.family.size == 3
    assert (judged.verdict.outcome, judged.verdict.exit_code) == ("FAIL", 1)
    assert "tpot of slow" in judged.verdict.reasons[0]
    slow = judged.results[1]
    assert slow.ratio == pytest.approx(1.06, rel=0.01)
    assert slow.low is not None
    assert slow.high is not None
    assert slow.low < slow.ratio < slow.high
    assert slow.valid_pairs == 10


def test_rounds_taken_in_turn_are_compared_round_by_round():
    base = 2 * [0.020, 0.021, 0.030, 0.040, 0.022]  # a neighbour came and went
    slow = [1.05 * t for t in base]
    slow[1] = 0.060  # and struck one round alone

    def ratios(in_turn: bool | None, candidate: list[float] = slow) -> list[float | None]:
        made = []
        for k in range(5):
            made.append(record("c", "base", k, None, in_turn=in_turn, metrics={"tpot": base}))
            made.append(record("c", "candidate", k, None, in_turn=in_turn, metrics={"tpot": candidate}))
        return [p.ratio for p in judge(made).results[0].pairs]

    apart, in_turn = ratios(None)[0], ratios(True)[0]
    assert apart is not None
    assert apart > 1.2
    assert in_turn == pytest.approx(1.05)
    assert ratios(True, slow[:9])[0] == pytest.approx(1.05 * 0.030 / 0.022)  # a round too few: no partner for each


def test_margin_by_metric():
    records = pairs("slow", 1.06)
    assert status(records, Rules(margins={"tpot": 0.10})) == {"slow": "EQUIVALENT"}


def test_only_gating_metrics_fail():
    records = pairs("slow", 1.06)
    judged = judge(records, Rules(gating=("ttft",)))
    assert judged.results[0].status == "REGRESSION"
    assert not judged.results[0].gating
    assert judged.verdict.outcome == "INCONCLUSIVE"


def test_a_disturbed_pair_does_not_count_and_its_repeat_does():
    records = pairs("c", 1.0)
    bad = record("c", "candidate", 3, 0.05, outcome="invalid", reason="steal 9 %")
    kept = [r for r in records if not (r.pair == 3 and r.side == "candidate")]
    judged = judge([*kept, bad]).results[0]
    assert judged.valid_pairs == 9
    assert judged.status == "EQUIVALENT"
    assert next(p for p in judged.pairs if p.index == 3).reason == "candidate disturbed: steal 9 %"
    again = [record("c", s, 3, 0.02, attempt=1) for s in ("base", "candidate")]
    judged = judge([*kept, bad, *again]).results[0]
    assert judged.valid_pairs == 10
    assert [(p.attempt, p.valid) for p in judged.pairs if p.index == 3] == [(0, False), (1, True)]


def test_too_few_undisturbed_pairs_are_invalid():
    records = [r.model_copy(update={"outcome": "invalid"}) if (r.pair or 0) > 3 else r for r in pairs("c", 1.0)]
    judged = judge(records)
    assert judged.results[0].status == "INVALID"
    assert judged.results[0].reason == "only 4 of 10 pairs were undisturbed"
    assert judged.verdict.exit_code == 3


def test_new_and_missing():
    base = [record("gone", "base", k, 0.02) for k in range(10)]
    lost = [
        record("gone", "candidate", k, None, outcome="oom", last_lines=["std::bad_alloc"], reason="out of memory")
        for k in range(2)
    ]
    new = [record("new", "candidate", k, 0.02) for k in range(10)]
    judged = judge([*base, *lost, *new, *pairs("same", 1.0)])
    assert {r.case: r.status for r in judged.results} == {"gone": "MISSING", "new": "NEW", "same": "EQUIVALENT"}
    gone = judged.results[0]
    assert gone.reason == "candidate ran out of memory in 2 of 2 attempts: std::bad_alloc"
    assert judged.verdict.exit_code == 1


def test_one_crash_of_the_candidate_alone_fails_the_verdict():
    records = pairs("c", 1.0, n=11)
    crashed = [
        r.model_copy(update={"outcome": "crash", "metrics": {}}) if (r.pair, r.side) == (4, "candidate") else r
        for r in records
    ]
    judged = judge(crashed)
    assert judged.results[0].status == "EQUIVALENT"
    assert judged.verdict.outcome == "FAIL"
    both = [r.model_copy(update={"outcome": "crash", "metrics": {}}) if r.pair == 4 else r for r in records]
    assert judge(both).verdict.outcome == "PASS"


def test_the_second_look_decides_only_what_the_first_left_open():
    noisy = pairs("open", 1.0, n=10, noise=0.06, seed=4)
    rules = Rules()
    assert status(noisy) == {"open": "INCONCLUSIVE"}
    assert needs_extension(noisy, rules) == ["open"]
    first = judge(noisy).results[0]
    assert first.pairs_needed is not None
    assert first.pairs_needed > 10
    calm = pairs("open", 1.0, n=5, noise=0.001, start=10)
    more = judge([*noisy, *calm]).results[0]
    assert more.look == 2
    assert more.valid_pairs == 15
    # A decided case keeps its decision, whatever more pairs say.
    decided = [*pairs("d", 1.0), *pairs("d", 1.5, n=5, start=10)]
    assert judge(decided).results[0].status == "EQUIVALENT"
    assert judge(decided).results[0].valid_pairs == 10


def test_a_decided_metric_keeps_its_decision_where_another_of_its_case_is_extended():
    """The extension measures whole cases; what it shows of a metric that was decided is no second chance."""

    def both(tpot: list[CaseRecord], ttft: list[CaseRecord]) -> list[CaseRecord]:
        return [
            a.model_copy(update={"metrics": {**a.metrics, "ttft": b.metrics["tpot"]}})
            for a, b in zip(tpot, ttft, strict=True)
        ]

    first = both(pairs("c", 1.0, noise=0.06, seed=4), pairs("c", 1.0))
    assert {r.metric: r.status for r in judge(first).results} == {"tpot": "INCONCLUSIVE", "ttft": "EQUIVALENT"}
    more = both(pairs("c", 1.0, n=5, noise=0.001, start=10), pairs("c", 1.5, n=5, start=10))
    found = {r.metric: r for r in judge([*first, *more]).results}
    assert (found["tpot"].look, found["tpot"].valid_pairs) == (2, 15)
    assert (found["ttft"].look, found["ttft"].valid_pairs, found["ttft"].status) == (1, 10, "EQUIVALENT")


def test_parity_failure_fails_a_faster_candidate():
    judged = judge(pairs("fast", 0.5))
    assert judged.verdict.outcome == "PASS"
    failed = verdict_of(judged.results, validation=example_validation(failing="mean_kld"))
    assert (failed.outcome, failed.exit_code) == ("FAIL", 1)
    assert failed.reasons[0].startswith("parity")
    assert verdict_of(judged.results, validation=example_validation()).outcome == "PASS"


def test_a_large_family_shares_its_variances():
    records = [r for c in range(40) for r in pairs(f"c{c}", 1.0, seed=c)]
    family = judge(records).family
    assert family.size == 40
    assert family.prior_sd["tpot"] == pytest.approx(0.004, rel=0.2)
    assert family.prior_df["tpot"] > 5


@pytest.mark.parametrize(
    ("ratio", "unit", "told"),
    [
        (1.99, "s", "99.0 % slower"),
        (2.0, "s", "2.00 times as slow"),
        (7.93, "s", "7.93 times as slow"),
        (0.51, "s", "49.0 % faster"),
        (0.5, "s", "2.00 times as fast"),
        (4.0, "B", "4.00 times as large"),
        (0.25, "B", "75.0 % less"),
        (248.4, "s", "248 times as slow"),
    ],
)
def test_a_large_change_is_told_in_times(ratio: float, unit: str, told: str):
    fields = (math.log(ratio), 0.01, 4.0, math.log(ratio), math.log(ratio), 1e-6, 1e-6)
    tested = paired.Tested(*(np.array([x]) for x in fields), priors={})
    assert compare._say("REGRESSION", tested, 0, 0.03, unit, 5, None).startswith(f"{told}, beyond the margin")
