"""Tests, intervals, verdicts and power, beside scipy and beside what is known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainlora_lab.statistics import pairs
from chainlora_lab.statistics.intervals import (
    bca_interval,
    interval_kind,
    mean_interval,
    t_interval,
)
from chainlora_lab.statistics.pairs import (
    LEVEL,
    compare_pairs,
    detectable,
    holm,
    judge,
    least_pairs,
    pairs_needed,
    sign_flip_test,
)


def compared(*differences):
    return compare_pairs(differences, [False] * len(differences))


def brute_force(values):
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(total >= abs(sum(values)) - 1e-9 * sum(map(abs, values)) for total in sums) / len(
        sums
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 2)), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_every_assignment(values):
    # both are counts over 2^n
    assert sign_flip_test(values) == pytest.approx(brute_force(values), abs=1e-12)


def test_known_p_values(monkeypatch):
    assert sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32  # the least that five pairs can reach
    assert sign_flip_test([0, 0, 0]) == 1
    assert sign_flip_test([1.0] * 30) == 2 / 2**30  # by halves, not by 2^30 sums
    # too many for the exact count: drawn, within 5 sd of the exact two-sided binomial tail
    monkeypatch.setattr(pairs, "NUM_DRAWS", draws := 50_000)
    many = [1.0] * 32 + [-1.0] * 18
    exact = 2 * sum(math.comb(50, k) for k in range(32, 51)) / 2**50
    assert sign_flip_test(many) == pytest.approx(exact, abs=5 * math.sqrt(exact / draws))


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_few_values_get_no_interval_some_student_s_and_many_the_bootstrap():
    from scipy.stats import ttest_1samp

    assert [interval_kind(count) for count in (1, 3, 4, 9, 10)] == ["none", "none", "t", "t", "BCa"]
    assert mean_interval([1.0, 2.0, 3.0]) == (-math.inf, math.inf)
    assert mean_interval([2.0] * 5) == (2.0, 2.0)
    (found,) = compared([0.1] * 9 + [0.1 + 2e-17])  # equal but for rounding
    assert (found.low, found.verdict) == (0.1, "wins")
    values = [0.1, 0.4, -0.3, 0.9, 1.4]
    found = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == t_interval(values) == pytest.approx((found.low, found.high))
    many = values * 2
    low, high = mean_interval(many)
    assert (low, high) == bca_interval(many) == mean_interval(many)  # seeded: the same every time
    assert low < sum(many) / 10 < high


def test_a_verdict_needs_interval_and_test(monkeypatch):
    assert judge(0.1, 0.5, 0.01, 0.01, 8) == "wins"
    assert judge(-0.5, -0.1, 0.05, 0.01, 8) == "loses"
    assert judge(0.1, 0.5, 0.06, 0.01, 8) == "no difference found"
    assert judge(-0.1, 0.5, 0.01, 0.01, 8) == "no difference found"
    assert judge(0.1, 0.5, 0.06, 0.06, 5) == "too few pairs"
    assert judge(0.1, 0.5, 0.01, 0.01, 3) == "too few pairs"  # whatever a test may say
    many, five, none = compared([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.3, 1.0], [1.0] * 5, [])
    assert none is None
    assert many.verdict == "wins"
    assert many.p_holm == 3 * many.p == 6 / 2**8  # three were planned, whatever is there
    assert five.verdict == "too few pairs"  # five pairs cannot reach 5 %
    # the second in Holm's order, even if as clear as can be
    assert five.smallest_p_holm == 2 * 2 / 32
    assert five.exact
    monkeypatch.setattr(pairs, "NUM_DRAWS", 1000)
    (drawn,) = compared([1.0 + 0.01 * k for k in range(48)])
    assert not drawn.exact
    # the one seen, of those drawn beside it; scipy counts both tails of a symmetric statistic
    assert drawn.p == drawn.smallest_p_holm == 1 / (1000 + 1)


@pytest.mark.parametrize("num_comparisons", [1, 2, 4, 8])
def test_the_least_number_of_pairs_is_the_least_that_can_decide(num_comparisons):
    least = least_pairs(num_comparisons)
    clear = [[1.0 + 0.01 * k for k in range(n)] for n in (least, least - 1)]
    assert compared(*[clear[0]] * num_comparisons)[0].verdict == "wins"
    assert compared(*[clear[1]] * num_comparisons)[0].verdict == "too few pairs"


@pytest.mark.parametrize(("num_pairs", "num_comparisons"), [(6, 1), (7, 2), (8, 3), (9, 1), (9, 6)])
def test_power_is_that_of_the_exact_test(num_pairs, num_comparisons):
    least = detectable(1.0, num_pairs, num_comparisons)
    drawn = least + np.random.default_rng(0).standard_normal((1000, num_pairs))
    found = [sign_flip_test(row) * num_comparisons <= LEVEL for row in drawn]
    # 3 sd of 1,000 draws are 0.038; from three assignments on, the power is that of a t-test
    assert np.mean(found) == pytest.approx(0.8, abs=0.045)


def test_power_of_many_pairs_is_that_of_the_paired_t_test():
    # Cohen 1988 by G*Power 3.1: d = 0.5, α 0.05 two-sided, power 0.8 needs 34 pairs; d = 0.8: 15
    assert (pairs_needed(1.0, 0.5), pairs_needed(1.0, 0.8)) == (34, 15)
    assert detectable(1.0, 34) <= 0.5 < detectable(1.0, 33)
    assert detectable(2.0, 12) == pytest.approx(2 * detectable(1.0, 12))
    assert detectable(1.0, 30, 5) > detectable(1.0, 30)
    assert detectable(1.0, 5) == math.inf  # five pairs decide nothing, however large it is
    assert pairs_needed(1.0, 100.0) == 6
    assert pairs_needed(1.0, 0.0) is None
