"""Comparisons of two methods over paired runs, and what may be concluded from them.

Runs of two methods under one seed see the same rows in the same order, so they are compared as
pairs. With so few pairs the intervals lean on assumptions; a verdict therefore needs the interval
*and* the exact test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chainlora_lab.statistics.intervals import (
    MIN_FOR_INTERVAL,
    Kind,
    interval_kind,
    mean_interval,
    mean_sd,
)
from chainlora_lab.statistics.power import LEVEL, detectable
from chainlora_lab.statistics.sign_flip import MAX_EXACT, holm, sign_flip_test, smallest_p

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
