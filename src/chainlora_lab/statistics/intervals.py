"""Intervals of a mean: none for three values, Student's t for four to nine, BCa bootstrap above.

The bootstrap is too narrow for few values (for five, a nominal 95 % covers about 85 %), and two or
three values say next to nothing about their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from chainlora.errors import ConfigError

Kind = Literal["none", "t", "BCa"]
_ROUNDING = 1e-12  # relative: differences of scores that are equal but for rounding
MIN_FOR_INTERVAL = 4
MIN_FOR_BOOTSTRAP = 10
NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95  # of an interval


def scipy_stats() -> Any:
    """Return `scipy.stats`, of an extra. Raises ConfigError if scipy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError(
            "reports and plans need scipy for their statistics (got none installed); "
            "pip install 'chainlora[experiments]'"
        ) from None
    return stats


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); the deviation of one value is NaN."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def interval_kind(num_values: int) -> Kind:
    """Return which interval so many values get."""
    if num_values < MIN_FOR_INTERVAL:
        return "none"
    return "t" if num_values < MIN_FOR_BOOTSTRAP else "BCa"


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval that `interval_kind` names; (-inf, inf) where that is none.

    Values that are all equal, to rounding, give an interval of no width.
    """
    kind = interval_kind(len(values))
    if kind == "none":
        return -math.inf, math.inf
    if max(values) - min(values) <= _ROUNDING * max(map(abs, values)):
        return values[0], values[0]
    return t_interval(values) if kind == "t" else bca_interval(values)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean (two values or more)."""
    mean, sd = mean_sd(values)
    quantile = scipy_stats().t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(quantile) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def bca_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the mean (Efron 1987); always the same one."""
    found = scipy_stats().bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
