"""Mixtures of rows as pure functions: weights of files, rows held out, rows of earlier stages.

Nothing here has a state or depends on the number of processes: what a step reads is a function of
(seed, step), and on which side a row is of its prompt alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
import torch
from numpy.typing import NDArray

from chainlora.data.order import seeded

_HASHES = 1 << 64


def mixed_rows(
    counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the rows of an epoch over several files, numbered as if these lay end to end.

    A weight is copies per epoch. Under 2.5 every row comes twice and half of the rows once more:
    other halves in the next epoch, so that after two epochs each has come five times.
    """
    parts, first = [], 0
    for file, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        share = Fraction(str(weight))
        whole, rest = divmod(share, 1)
        parts += [np.arange(first, first + count)] * int(whole)
        start, end = floor(epoch * rest * count), floor((epoch + 1) * rest * count)
        parts.append(first + _dealt(count, f"{seed} file {file}", start, end))
        first += count
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def replayed_rows(
    num_rows: int, share: float, batch_size: int, seed: int, step: int
) -> NDArray[np.int64]:
    """Return which of `num_rows` earlier rows a step reads again.

    These are floor((k + 1)·p·B) − floor(k·p·B) rows in step k of batches of B rows, a share p of
    them: 2 % of batches of 8 is one row in six steps or seven. All rows come once before one comes
    again.
    """
    per_step = Fraction(str(share)) * batch_size
    return _dealt(num_rows, f"{seed} replay", floor(step * per_step), floor((step + 1) * per_step))


def held_out_bound(prompts: Iterable[str], validation: float | int) -> int:
    """Return the bound for `is_held_out` that holds out a share, or a number of different prompts.

    A number (of 1 or more) is for the rows that are there. Kept with the run, the bound holds for
    rows that come later too, of which it takes the same share: no row ever changes sides.
    """
    if isinstance(validation, float):
        return floor(Fraction(str(validation)) * _HASHES)
    hashes = sorted({_hash(prompt) for prompt in prompts})
    return _HASHES if validation > len(hashes) else 1 + hashes[validation - 1]


def is_held_out(prompt: str, bound: int) -> bool:
    """Say whether a row is for validation: by its prompt alone, wherever the row stands."""
    return _hash(prompt) < bound


def _hash(prompt: str) -> int:
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _dealt(count: int, name: str, start: int, end: int) -> NDArray[np.int64]:
    """Return the places `start` to `end` of rows that are shuffled and dealt again and again."""
    if not count:
        return np.empty(0, np.int64)
    places = np.arange(start, end)
    rows = np.empty(len(places), np.int64)
    for deal in range(start // count, -(-end // count)):
        here = places // count == deal
        rows[here] = _shuffled(count, f"{name} {deal}")[places[here] % count]
    return rows


@lru_cache(maxsize=8)
def _shuffled(count: int, name: str) -> NDArray[np.int64]:
    found: NDArray[np.int64] = torch.randperm(count, generator=seeded(name)).numpy()
    return found
