"""Power: which difference so many pairs can find, and how many pairs a difference needs.

It is that of the sign-flip test on normal differences, at level α / m: the first step of Holm's
correction over m comparisons. Where that test can reach few p-values, the paired t-test finds more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from chainlora_lab.statistics.intervals import scipy_stats
from chainlora_lab.statistics.sign_flip import MAX_EXACT, least_pairs

LEVEL = 0.05  # of a verdict
POWER = 0.8  # Cohen's convention: one real difference in five is missed
_MAX_PAIRS = 100_000


def detectable(sd: float, num_pairs: int, num_comparisons: int = 1) -> float:
    """Return the mean difference that is found with `POWER` at `LEVEL`; inf where none can be.

    Args:
        sd: standard deviation of the paired differences.
        num_pairs: pairs of each comparison.
        num_comparisons: comparisons corrected together.
    """
    if num_pairs < max(4, least_pairs(num_comparisons, LEVEL)) or math.isnan(sd):
        return math.inf
    return sd * _effect(num_pairs, LEVEL / num_comparisons)


def pairs_needed(sd: float, difference: float, num_comparisons: int = 1) -> int | None:
    """Return how many pairs find a mean difference with `POWER`; None above 100,000."""

    def is_found(num_pairs: int) -> bool:
        return detectable(sd, num_pairs, num_comparisons) <= abs(difference)

    numbers = range(max(4, least_pairs(num_comparisons, LEVEL)), _MAX_PAIRS + 1)
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
