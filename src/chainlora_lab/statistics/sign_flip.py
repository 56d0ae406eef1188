"""The exact paired test and Holm's correction.

`scipy.stats.permutation_test` enumerates assignments one by one, so it is exact up to some 20
pairs; six tasks by five seeds are 30. The exact count here sorts the sums of two halves instead and
reaches 40; beyond that scipy draws. scipy has no Holm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chainlora_lab.statistics.intervals import scipy_stats

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


def least_pairs(num_comparisons: int, level: float) -> int:
    """Return how many pairs each of so many comparisons needs for a verdict to be possible."""
    return next(n for n in range(1, 1000) if num_comparisons * smallest_p(n) <= level)
