"""The statistics against scipy, against known values, and against what their intervals promise."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from reports.stats import (
    Estimate,
    compare,
    median,
    paired_ratio,
    percentile,
    relative_spread,
)

TIMES = st.floats(min_value=1e-6, max_value=1e3)


def test_median_interval_is_the_known_pair_of_order_statistics():
    # n = 10: x(2) and x(9), coverage 97.9 %; n = 20: x(6) and x(15), 95.9 % (tables of the sign test).
    assert median(range(1, 11)) == Estimate(5.5, 2, 9, 10)
    assert median(range(20, 0, -1)) == Estimate(10.5, 6, 15, 20)


@pytest.mark.parametrize("n", range(1, 60))
def test_median_interval_covers_95_percent_and_not_needlessly_more(n):
    found = median(list(range(1, n + 1)))
    binomial = scipy_stats.binom(n, 0.5)
    if found.low is None:
        assert 1 - 2 * binomial.cdf(0) < 0.95
        assert found.high is None
        return
    assert found.high == n + 1 - found.low
    assert 1 - 2 * binomial.cdf(found.low - 1) >= 0.95
    assert 1 - 2 * binomial.cdf(found.low) < 0.95


def test_median_interval_covers_in_simulation():
    rng = np.random.default_rng(1)
    draws = rng.lognormal(0, 0.3, (2000, 12))
    found = [median(row.tolist()) for row in draws]
    covered = np.mean([e.low <= 1 <= e.high for e in found])
    assert 0.93 <= covered <= 0.985


def test_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        median([])


@given(st.lists(TIMES, min_size=1, max_size=60))
def test_median_agrees_with_the_standard_library_and_lies_in_its_interval(values):
    found = median(values)
    assert found.value == pytest.approx(statistics.median(values))
    if found.low is not None:
        assert min(values) <= found.low <= found.value <= found.high <= max(values)


@pytest.mark.parametrize(("q", "least"), [(90, 64), (95, 130), (99, 662)])
def test_percentile_only_from_enough_samples(q, least):
    values = [float(v) for v in range(least)]
    assert percentile(values[:-1], q) is None
    assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_relative_spread_is_scipys_scaled_mad_over_the_median():
    values = np.random.default_rng(2).normal(10, 0.4, 500)
    expected = scipy_stats.median_abs_deviation(values, scale="normal") / np.median(values)
    assert relative_spread(values.tolist()) == pytest.approx(expected, rel=1e-4)
    assert relative_spread(values.tolist()) == pytest.approx(0.04, rel=0.15)


def test_relative_spread_ignores_one_stray_round_and_needs_three():
    assert relative_spread([1.0, 1.0, 1.0, 1.0, 90.0]) == 0
    assert relative_spread([1.0, 2.0]) is None
    assert relative_spread([0.0, 0.0, 0.0]) is None


def test_paired_ratio_is_the_median_of_the_pairs_with_its_interval():
    rng = np.random.default_rng(3)
    a, b = rng.lognormal(0, 0.1, 9).tolist(), rng.lognormal(1, 0.1, 9).tolist()
    found, ratios = paired_ratio(a, b), sorted(x / y for x, y in zip(a, b, strict=True))
    # n = 9: x(2) and x(8), coverage 96.1 %.
    assert found == Estimate(ratios[4], ratios[1], ratios[7], 9)


def test_paired_ratio_ignores_one_stray_round():
    quiet, stray = [1.0] * 9, [1.0] * 8 + [40.0]
    assert paired_ratio([0.5] * 9, stray) == paired_ratio([0.5] * 9, quiet) == Estimate(0.5, 0.5, 0.5, 9)


def test_paired_ratio_cancels_shared_drift():
    drift = [1.0, 1.4, 0.8, 2.0, 1.1, 0.9]
    found = paired_ratio([0.25 * d for d in drift], drift)
    assert found.low == pytest.approx(0.25, rel=1e-9)
    assert found.high == pytest.approx(0.25, rel=1e-9)


def test_paired_ratio_interval_covers_in_simulation():
    rng = np.random.default_rng(4)
    a, b = rng.lognormal(0, 0.05, (2000, 10)), rng.lognormal(0, 0.05, (2000, 10))
    found = [paired_ratio(x.tolist(), y.tolist()) for x, y in zip(a, b, strict=True)]
    covered = np.mean([e.low <= 1 <= e.high for e in found])
    # n = 10: x(2) and x(9) cover 97.9 %.
    assert 0.965 <= covered <= 0.99


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=15).map(lambda x: [*x, *x[1:]]))
def test_paired_ratio_of_an_odd_number_is_reciprocal(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    there, back = paired_ratio(a, b), paired_ratio(b, a).inverse()
    assert there.value == pytest.approx(back.value)
    if there.low is not None:
        assert (there.low, there.high) == pytest.approx((back.low, back.high))


def test_paired_ratio_of_one_pair_has_no_interval_and_bad_samples_are_errors():
    assert paired_ratio([2.0], [1.0]) == Estimate(pytest.approx(2.0), None, None, 1)
    for a, b in (([], [1.0]), ([0.0], [1.0]), ([1.0], [-1.0])):
        with pytest.raises(ValueError, match="ratio"):
            paired_ratio(a, b)


def test_compare_pairs_rounds_by_index(make_record):
    record = make_record(rounds=8)
    case = record.cases()[1]
    found = compare(record, case, "tpot", "onnx", "pytorch")
    first, second = record.find(case, "onnx").rounds, record.find(case, "pytorch").rounds
    ratios = [a.tpot_s / b.tpot_s for a, b in zip(first, second, strict=True)]
    assert found.ratio.value == pytest.approx(statistics.median(ratios))
    assert found.candidate.value == pytest.approx(statistics.median(r.tpot_s for r in first))
    assert found.ratio.n == 8
    assert found.speedup.value == pytest.approx(1 / found.ratio.value)
    assert found.speedup.low == pytest.approx(1 / found.ratio.high)


def test_compare_knows_each_metric_and_what_was_not_measured(make_record):
    record = make_record()
    case = record.cases()[0]
    for metric, pick in (("ttft", lambda r: r.ttft_s), ("total", lambda r: r.total_s)):
        expected = statistics.median(pick(r) for r in record.find(case, "genai").rounds)
        assert compare(record, case, metric, "onnx", "genai").other.value == pytest.approx(expected)
    assert compare(record, case, "ttft", "onnx", "nobody") is None


def test_compare_refuses_a_broken_clock(make_record):
    record = make_record(rounds=3)
    series = [s.model_dump() for s in record.series]
    series[0]["rounds"][1]["at_s"][0] = 0.0
    broken = make_record(rounds=3, series=series)
    assert compare(broken, broken.cases()[0], "ttft", "onnx", "pytorch") is None
    assert compare(broken, broken.cases()[0], "tpot", "onnx", "pytorch") is not None
