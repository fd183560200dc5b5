"""The numbers behind a verdict, against other implementations and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reports.paired import (
    RESOLUTION,
    assess,
    decide,
    fit_prior,
    holm,
    moderate,
    pairs_needed,
    trimmed,
)


def test_without_trimming_it_is_the_paired_t():
    rng = np.random.default_rng(0)
    d = rng.normal(0.01, 0.02, 9)  # below 10 pairs nothing is trimmed
    found = assess([d], ["tpot"], 1, looks=1)
    theirs = stats.ttest_1samp(d, 0)
    assert found.p[0] == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.90)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))


def test_trimmed_t_is_yuens():
    rng = np.random.default_rng(1)
    d = rng.normal(0.01, 0.02, 12)
    spread = trimmed([d])
    ordered = np.sort(d)
    winsorised = ordered.copy()
    winsorised[0], winsorised[-1] = ordered[1], ordered[-2]
    error = math.sqrt(11 * winsorised.var(ddof=1) / (10 * 9))
    assert spread.centre[0] == pytest.approx(stats.trim_mean(d, 0.1))
    assert math.sqrt(spread.variance[0] / 12) == pytest.approx(error)
    assert spread.df[0] == 9


def test_uneven_rows_are_what_each_is_alone():
    rng = np.random.default_rng(2)
    rows = [rng.normal(0, 0.02, n) for n in (10, 15, 7, 10)]
    together = trimmed(rows)
    for k, row in enumerate(rows):
        alone = trimmed([row])
        assert together.centre[k] == alone.centre[0]
        assert together.variance[k] == alone.variance[0]


def test_one_wild_pair_does_not_hide_a_regression():
    d = np.random.default_rng(3).normal(math.log(1.05), 0.015, 10)
    d[4] = math.log(0.6)
    margin = np.array([math.log(1.03)])
    assert decide(assess([d], ["tpot"], 2), margin)[0] == "REGRESSION"
    assert stats.ttest_1samp(d, 0).pvalue > 0.05  # what the plain test would have said


def test_prior_of_equal_variances_is_unbounded_and_of_unequal_ones_small():
    rng = np.random.default_rng(4)
    df = np.full(4000, 9.0)
    equal = fit_prior(0.02**2 * rng.chisquare(9, 4000) / 9, df)
    assert equal.df > 100
    assert math.sqrt(equal.variance) == pytest.approx(0.02, rel=0.05)
    known = 6.0  # variances that are s0^2 F(9, 6) have a prior of 6 degrees of freedom
    spread = fit_prior(0.02**2 * rng.f(9, known, 4000), np.full(4000, 9.0))
    assert spread.df == pytest.approx(known, rel=0.15)
    assert math.sqrt(spread.variance) == pytest.approx(0.02, rel=0.05)


def test_degrees_of_freedom_never_exceed_what_was_measured():
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 0.02, (8, 9))
    _, df, priors = moderate(trimmed(rows), ["a"] * 8)
    assert set(priors) == {"a"}
    assert (df <= 8 * 8).all()
    _, alone, none = moderate(trimmed(rows[:7]), ["a"] * 7)
    assert none == {}
    assert (alone == 8).all()
    # Another metric's rows do not count for this one's pool.
    _, _, separate = moderate(trimmed(rows), ["a"] * 4 + ["b"] * 4)
    assert separate == {}


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03]), 3).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.01, 0.04]), 4).tolist() == pytest.approx([0.04, 0.12])


def test_both_looks_and_the_whole_family_are_paid_for():
    d = np.random.default_rng(6).normal(0.03, 0.02, (1, 10))
    one = assess(d, ["a"], 1, looks=1)
    two = assess(d, ["a"], 5, looks=2)
    assert two.p[0] == one.p[0]
    assert two.p_holm[0] == pytest.approx(10 * one.p[0])
    assert two.high[0] > one.high[0]


def test_rows_outside_the_family_do_not_make_it_stricter():
    rows = np.random.default_rng(7).normal(0.0, 0.02, (3, 10))
    gating = np.array([True, False, False])
    assert assess(rows, ["a", "b", "c"], 1, gating).p_holm[0] == assess(rows[:1], ["a"], 1).p_holm[0]


@pytest.mark.parametrize(
    ("shift", "status"), [(0.06, "REGRESSION"), (-0.06, "IMPROVED"), (0.0, "EQUIVALENT"), (0.015, "EQUIVALENT")]
)
def test_statuses(shift: float, status: str):
    d = np.random.default_rng(8).normal(0, 0.004, 10)
    found = decide(assess([d - d.mean() + shift], ["a"], 1), np.array([math.log(1.03)]))
    assert found[0] == status


def test_sure_but_small_is_no_regression_and_large_but_unsure_is_inconclusive():
    margin = np.array([math.log(1.03)])
    small = np.random.default_rng(9).normal(0, 0.001, 10)
    tested = assess([small - small.mean() + 0.02], ["a"], 1)
    assert tested.p_holm[0] < 1e-6
    assert decide(tested, margin)[0] == "EQUIVALENT"
    unsure = np.random.default_rng(9).normal(0, 0.15, 10)
    assert decide(assess([unsure - unsure.mean() + 0.05], ["a"], 1), margin)[0] == "INCONCLUSIVE"


def test_equal_samples_are_no_infinite_proof():
    tested = assess([[1e-5] * 10], ["memory"], 1)
    assert tested.error[0] == pytest.approx(RESOLUTION / math.sqrt(10))
    assert tested.p[0] > 0.5


def test_pairs_needed_decides_as_often_as_it_says():
    rng = np.random.default_rng(10)
    margin = math.log(1.03)
    for centre, size in ((0.0, 1), (math.log(1.06), 40)):
        n = pairs_needed(centre, 0.05, margin, size)
        assert n is not None
        rows = rng.normal(centre, 0.05, (800, n))
        tested = assess(rows, list(range(800)), 1)
        decided = (tested.high < margin) if centre == 0 else tested.p * 2 * size <= 0.05
        assert decided.mean() == pytest.approx(0.9, abs=0.1)  # trimming costs a little
    assert pairs_needed(margin - 1e-4, 0.02, margin, 1) is None
    assert pairs_needed(0.0, 0.001, margin, 1, have=15) == 16


def test_a_single_pair_is_refused():
    with pytest.raises(ValueError, match="two values"):
        trimmed([[0.1]])
