"""Statistics of a handful of paired runs: pure functions, no model in sight.

Runs of two methods under one seed see the same rows in the same order, so they are compared as
pairs. With so few pairs only an exact test is honest: every assignment of signs to the differences
is counted. Intervals are BCa bootstrap (Efron 1987), known to be too narrow under ten pairs; a
verdict therefore needs the interval *and* the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np

Verdict = Literal["wins", "loses", "undecided"]
LEVEL = 0.05  # of a verdict
MAX_EXACT = 40  # pairs; 2 × 2^20 half sums of 8 bytes, a second or two
NUM_DRAWS = 1_000_000  # sign assignments where they are too many to count
_TIE = 1e-9  # relative: sums of the same numbers in another order differ by rounding only


@dataclass(frozen=True)
class Difference:
    """A method less its rival over paired runs, oriented so that positive is better.

    `low` and `high` bound the mean difference; `p` is the two-sided p-value, `exact` or sampled,
    `p_holm` corrected for all comparisons planned together; `smallest_p_holm` is what that would be
    if every one of them were as clear as the pairs it has allow.
    """

    num_pairs: int
    mean: float
    sd: float
    low: float
    high: float
    p: float
    p_holm: float
    smallest_p_holm: float
    exact: bool
    verdict: Verdict


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); the deviation of one value is NaN."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def bootstrap_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> tuple[float, float]:
    """Return a bootstrap interval of the mean. The same values and seed give the same interval.

    Values that are all equal give an interval of no width; one value gives (-inf, inf): nothing is
    known.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return -math.inf, math.inf
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    draws = np.random.default_rng(seed).integers(0, len(data), (num_resamples, len(data)))
    means = data[draws].mean(axis=1)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if method == "bca":
        tails = _bca_tails(data, means, tails)
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def _bca_tails(
    data: np.ndarray, means: np.ndarray, tails: tuple[float, float]
) -> tuple[float, float]:
    """Bias-corrected, accelerated quantiles (Efron 1987, equations 2.3 and 6.6; jackknife
    acceleration)."""
    normal = NormalDist()
    below = (np.mean(means < data.mean()) + np.mean(means <= data.mean())) / 2  # ties count half
    bias = normal.inv_cdf(min(max(float(below), 1 / len(means)), 1 - 1 / len(means)))
    left_out = (data.sum() - data) / (len(data) - 1)
    spread = left_out.mean() - left_out
    acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    adjusted = []
    for tail in tails:
        z = bias + normal.inv_cdf(tail)
        adjusted.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return adjusted[0], adjusted[1]


def sign_flip_test(
    differences: Sequence[float], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> float:
    """Return the two-sided p-value that the differences are symmetric about zero, exact for up to
    40.

    The share of the 2^n sign assignments whose sum is at least as far from zero as the one seen,
    counted by sorting the sums of two halves. For more than 40 differences, `num_draws` assignments
    are drawn instead, the one seen among them (Phipson & Smyth 2010). Raises ValueError for none.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("the sign-flip test takes at least one difference (got none)")
    seen = abs(values.sum()) - _TIE * max(np.abs(values).sum(), 1e-300)
    if seen <= 0:
        return 1.0
    if len(values) > MAX_EXACT:
        return _sampled_sign_flips(values, seen, num_draws, seed)
    half = len(values) // 2
    one, two = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    beyond = len(two) * len(one) - np.searchsorted(two, seen - one, side="left").sum()
    return float(
        2 * beyond / (len(one) * len(two))
    )  # the sums are symmetric: as many lie below -seen


def _sampled_sign_flips(values: np.ndarray, seen: float, num_draws: int, seed: int) -> float:
    generator, beyond = np.random.default_rng(seed), 0
    for begin in range(0, num_draws, 10_000):
        signs = generator.integers(0, 2, (min(10_000, num_draws - begin), len(values))) * 2 - 1
        beyond += int((np.abs(signs @ values) >= seen).sum())
    return (beyond + 1) / (num_draws + 1)


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = running
    return adjusted


def judge(low: float, high: float, p: float, level: float = LEVEL) -> Verdict:
    """Return `wins` or `loses` when the interval excludes zero and p is at most `level`, else
    `undecided`."""
    if p > level or low <= 0 <= high:
        return "undecided"
    return "wins" if low > 0 else "loses"


def smallest_p(num_pairs: int) -> float:
    """Return the smallest two-sided p-value that so many pairs can reach (`sign_flip_test`); 1 for
    none."""
    if num_pairs == 0:
        return 1.0
    return 2.0 ** (1 - num_pairs) if num_pairs <= MAX_EXACT else 1 / (NUM_DRAWS + 1)


def least_pairs(num_comparisons: int, level: float = LEVEL) -> int:
    """Return how many pairs each of so many comparisons needs for a verdict to be possible at
    all."""
    return next(n for n in range(1, 1000) if num_comparisons * 2.0 ** (1 - n) <= level)


def compare_pairs(
    differences: Sequence[Sequence[float]], *, confidence: float = 0.95
) -> list[Difference | None]:
    """Compare several sets of paired differences, p-values Holm-corrected together; None for an
    empty set.

    An empty set is a comparison planned and not there yet: it counts in the correction, so that a
    verdict does not depend on how much of the plan is done.
    """
    tests = [sign_flip_test(values) if values else 1.0 for values in differences]
    corrected = holm(tests)
    smallest = holm([smallest_p(len(values)) for values in differences])
    found: list[Difference | None] = []
    for index, values in enumerate(differences):
        if not values:
            found.append(None)
            continue
        mean, sd = mean_sd(values)
        low, high = bootstrap_interval(values, confidence=confidence)
        found.append(
            Difference(
                len(values),
                mean,
                sd,
                low,
                high,
                tests[index],
                corrected[index],
                smallest[index],
                len(values) <= MAX_EXACT,
                judge(low, high, corrected[index], 1 - confidence),
            )
        )
    return found
