"""Power: which difference so many pairs can find, and how many pairs a difference needs.

Computed for the paired t-test at level α / m (the first step of Holm's correction over m
comparisons), whose power the sign-flip test shares once its smallest p-value is below that level.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from chainlora.experiments.statistics.intervals import scipy_stats
from chainlora.experiments.statistics.sign_flip import least_pairs

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
    """Return the effect size d = mean / sd of a two-sided paired t-test, by bisection."""
    stats, freedom = scipy_stats(), num_pairs - 1
    critical = stats.t.ppf(1 - level / 2, freedom)

    def reached(effect: float) -> float:
        return float(stats.nct.sf(critical, freedom, effect * math.sqrt(num_pairs)))

    low, high = 0.0, 1.0
    while reached(high) < POWER:
        high *= 2
    for _ in range(40):  # halvings: 1e-12 of the first bracket
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < POWER else (low, middle)
    return high
