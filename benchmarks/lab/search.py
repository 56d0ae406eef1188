"""The search for a learning rate: the same rule for every arm, and the best rate is interior.

Three rates a factor of two apart around a guess; then, as long as the best is an end, one beyond
it; then midpoints beside the best. It is settled after a number of tries, if the best is interior.
A pure function of what was tried, so a search can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_EXTENSIONS = 4


def next_rate(tried: Mapping[float, float], guess: float) -> float:
    """Return the rate to try next, given the mean loss of those tried."""
    for factor in (1.0, 2.0, 0.5):
        if _rounded(guess * factor) not in tried:
            return _rounded(guess * factor)
    rates, best = sorted(tried), best_rate(tried)
    if best == rates[-1]:
        return _rounded(best * 2)
    if best == rates[0]:
        return _rounded(best / 2)
    place = rates.index(best)
    sides = sorted((rates[place - 1], rates[place + 1]), key=lambda rate: tried[rate])
    gaps = sorted(
        sides, key=lambda rate: -abs(math.log(rate / best))
    )  # stable: the wider gap first
    return _rounded(math.sqrt(gaps[0] * best))


def is_settled(tried: Mapping[float, float], tries: int) -> bool:
    """Return whether a search has had its tries and found an interior best, or has lost its way."""
    enough = len(tried) >= tries and is_interior(tried)
    return enough or len(tried) >= tries + _EXTENSIONS


def best_rate(tried: Mapping[float, float]) -> float:
    """Return the rate of the lowest loss."""
    return min(tried, key=lambda rate: tried[rate])


def is_interior(tried: Mapping[float, float]) -> bool:
    """Return whether the best rate lies between two others."""
    return min(tried) < best_rate(tried) < max(tried)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
