"""Two methods over paired runs: the exact test, its power, and what may be concluded.

Runs of two methods under one seed see the same rows in the same order, so they are compared as
pairs. With so few pairs the intervals lean on assumptions; a verdict therefore needs the interval
*and* the exact test.

`scipy.stats.permutation_test` enumerates assignments one by one, so it is exact up to some 20
pairs; six tasks by five seeds are 30. The exact count here sorts the sums of two halves instead and
reaches 40; beyond that scipy draws. scipy has no Holm.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from chainlora_lab.statistics.intervals import (
    MIN_FOR_INTERVAL,
    Kind,
    interval_kind,
    mean_interval,
    mean_sd,
    scipy_stats,
)

LEVEL = 0.05  # of a verdict
POWER = 0.8  # Cohen's convention: one real difference in five is missed
_MAX_PAIRS = 100_000
MAX_EXACT = 40  # pairs; 2 × 2^20 half sums of 8 bytes, a second or two
NUM_DRAWS = 1_000_000  # sign assignments where there are too many to count
_TIE = 1e-9  # relative: sums of the same numbers in another order differ by rounding only
_BATCH = 10_000  # assignments drawn at a time, so that memory stays small


def sign_flip_test(differences: Sequence[float]) -> float:
    """Return the two-sided p-value that the differences, one at least, are symmetric about zero.

    It is the share of the 2^n sign assignments whose sum is at least as far from zero as the one
    seen: exact for up to 40 differences, from `NUM_DRAWS` assignments for more, the one seen among
    them (Phipson & Smyth 2010).
    """
    values = np.asarray(differences, dtype=np.float64)
    seen = abs(values.sum()) - _TIE * max(np.abs(values).sum(), 1e-300)
    if seen <= 0:
        return 1.0
    if len(values) > MAX_EXACT:
        return _drawn_test(values)
    half = len(values) // 2
    one, two = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    beyond = len(two) * len(one) - np.searchsorted(two, seen - one, side="left").sum()
    # the sums are symmetric: as many lie below -seen
    return float(2 * beyond / (len(one) * len(two)))


def _drawn_test(values: np.ndarray) -> float:
    found = scipy_stats().permutation_test(
        (values,),
        lambda sample, axis: np.abs(sample.sum(axis=axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_DRAWS,
        batch=_BATCH,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


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


def smallest_p(num_pairs: int) -> float:
    """Return the smallest two-sided p-value that so many pairs can reach; 1 for none."""
    if num_pairs == 0:
        return 1.0
    return 2.0 ** (1 - num_pairs) if num_pairs <= MAX_EXACT else 1 / (NUM_DRAWS + 1)


def least_pairs(num_comparisons: int) -> int:
    """Return how many pairs each of so many comparisons needs for a verdict to be possible."""
    return next(n for n in range(1, 1000) if num_comparisons * smallest_p(n) <= LEVEL)


# --- power ---
#
# Which difference so many pairs can find, and how many pairs a difference needs: that of the
# sign-flip test on normal differences, at level α / m, the first step of Holm's correction over m
# comparisons. Where that test can reach few p-values, the paired t-test finds more.


def detectable(sd: float, num_pairs: int, num_comparisons: int = 1) -> float:
    """Return the mean difference that is found with `POWER` at `LEVEL`; inf where none can be.

    `sd` is that of the paired differences; `num_comparisons` are corrected together.
    """
    if num_pairs < max(4, least_pairs(num_comparisons)) or math.isnan(sd):
        return math.inf
    return sd * _effect(num_pairs, LEVEL / num_comparisons)


def pairs_needed(sd: float, difference: float, num_comparisons: int = 1) -> int | None:
    """Return how many pairs find a mean difference with `POWER`; None above 100,000."""

    def is_found(num_pairs: int) -> bool:
        return detectable(sd, num_pairs, num_comparisons) <= abs(difference)

    numbers = range(max(4, least_pairs(num_comparisons)), _MAX_PAIRS + 1)
    place = bisect_left(numbers, True, key=is_found)
    return numbers[place] if difference and place < len(numbers) else None


def _effect(num_pairs: int, level: float) -> float:
    """Return the effect size d = mean / sd that is found with `POWER`, by bisection."""
    reached = _power_of(num_pairs, level)
    low, high = 0.0, 1.0
    while reached(high) < POWER:
        high *= 2
    for _ in range(40):  # halvings: 1e-12 of the first bracket
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < POWER else (low, middle)
    return high


def _power_of(num_pairs: int, level: float) -> Callable[[float], float]:
    """Return the power of the one-sided half of the test as a function of the effect size.

    The sum of the differences must be among the `places` largest of the 2ⁿ. The largest has no sign
    below zero, the second the smallest difference alone. Of more places, the power is within 0.05
    of the t-test's at the level that so many have.
    """
    stats, freedom = scipy_stats(), num_pairs - 1
    half = 2.0 ** min(freedom, MAX_EXACT)  # of the assignments; from there on all levels are there
    places = math.floor(level * half)
    if places > 2:
        critical = stats.t.ppf(1 - places / half / 2, freedom)
        return lambda d: float(stats.nct.sf(critical, freedom, d * math.sqrt(num_pairs)))
    size, step = np.linspace(0, 8, 4001, retstep=True)  # of the difference that is below zero

    def power(d: float) -> float:
        second = num_pairs * stats.norm.pdf(size + d) * stats.norm.cdf(d - size) ** freedom
        return float(stats.norm.cdf(d) ** num_pairs + (places - 1) * second.sum() * step)

    return power


# --- verdicts ---

Verdict = Literal["wins", "loses", "no difference found", "too few pairs"]
VERDICTS: tuple[Verdict, ...] = ("wins", "loses", "no difference found", "too few pairs")


@dataclass(frozen=True)
class Difference:
    """A method less its rival over paired runs, in the unit of what is compared.

    Attributes:
        low, high: interval of the mean difference; `interval` says which kind.
        p: two-sided p-value, `exact` or drawn; `p_holm` is corrected for all comparisons planned.
        smallest_p_holm: `p_holm` if all comparisons planned were as clear as their pairs allow.
        detectable: the difference that so many pairs of this spread find with 80 % power.
    """

    num_pairs: int
    mean: float
    sd: float
    low: float
    high: float
    interval: Kind
    p: float
    p_holm: float
    smallest_p_holm: float
    exact: bool
    detectable: float
    verdict: Verdict


def judge(
    low: float,
    high: float,
    p: float,
    smallest_p: float,
    num_pairs: int,
    *,
    lower_is_better: bool = False,
) -> Verdict:
    """Return what may be said of a difference.

    `too few pairs`: no result could have been a verdict. `no difference found`: one could have
    been, and this is none. `wins` and `loses` need an interval without zero and p at most `LEVEL`.
    """
    if num_pairs < MIN_FOR_INTERVAL or smallest_p > LEVEL:
        return "too few pairs"
    if p > LEVEL or not (low > 0 or high < 0):
        return "no difference found"
    return "wins" if (high < 0 if lower_is_better else low > 0) else "loses"


def compare_pairs(
    differences: Sequence[Sequence[float]], lower_is_better: Sequence[bool]
) -> list[Difference | None]:
    """Compare several sets of paired differences, Holm-corrected together; None for an empty set.

    `lower_is_better` says for each set whether a negative difference is a win.

    An empty set is a comparison planned and not there yet: it counts in the correction, so that a
    verdict does not depend on how much of the plan is done.
    """
    num_planned = len(differences)
    tests = [sign_flip_test(values) if values else 1.0 for values in differences]
    corrected = holm(tests)
    smallest = holm([smallest_p(len(values)) for values in differences])

    def difference(
        values: Sequence[float], is_lower: bool, p: float, p_holm: float, least: float
    ) -> Difference:
        count = len(values)
        mean, sd = mean_sd(values)
        low, high = mean_interval(values)
        return Difference(
            num_pairs=count,
            mean=mean,
            sd=sd,
            low=low,
            high=high,
            interval=interval_kind(count),
            p=p,
            p_holm=p_holm,
            smallest_p_holm=least,
            exact=count <= MAX_EXACT,
            detectable=detectable(sd, count, num_planned),
            verdict=judge(low, high, p_holm, least, count, lower_is_better=is_lower),
        )

    rows = zip(differences, lower_is_better, tests, corrected, smallest, strict=True)
    return [difference(*row) if row[0] else None for row in rows]
