"""What an epoch reads, and in which order: weights of files, rows held out, earlier stages.

Nothing here has a state or depends on the number of processes: what a step reads is a function of
(seed, step), and on which side a row is of its prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
import torch
from numpy.typing import NDArray

from chainlora.data.examples import Example, hash_of
from chainlora.data.rows import Rows
from chainlora.models.modes import seeded

# Rows are sorted by length within this many batches: long enough that lengths are alike, short
# enough that the order stays random.
_WINDOW = 32
_HASHES = 1 << 63  # how many there are of a prompt or an example


@dataclass(frozen=True)
class Mixture:
    """What training reads: rows of files, each with its weight, and rows of earlier stages.

    Rows are numbered as if the files lay end to end, the `num_earlier` rows of earlier stages after
    them. `replay` is the share of a batch that is added to it from these.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    num_earlier: int = 0
    replay: float = 0.0

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def per_epoch(self) -> int:
        """Rows that an epoch reads of the files: the same number in every epoch."""
        return sum(map(_per_epoch, self.counts, self.weights))

    @property
    def is_even(self) -> bool:
        """Say whether every epoch reads the same rows."""
        files = zip(self.counts, self.weights, strict=True)
        return all(_per_epoch(count, weight) % max(count, 1) == 0 for count, weight in files)

    def epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the rows of an epoch.

        A weight is copies per epoch: a file of n rows and weight w gives round(w·n) of them to
        every epoch, one at least. All rows of a file come once before one comes again, from epoch
        to epoch.
        """
        parts, first = [], 0
        for file, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            size = _per_epoch(count, weight)
            dealt = _dealt(count, f"{seed} file {file}", epoch * size, (epoch + 1) * size)
            parts.append(first + np.sort(dealt))
            first += count
        return np.concatenate(parts)

    def added(self, batch_size: int, seed: int, batch: int) -> list[int]:
        """Return the rows of earlier stages that the run's batch of this number gets.

        These are floor((k + 1)·p·B) − floor(k·p·B) rows for batch k of B rows, a share p of them:
        2 % of batches of 8 is one row in six batches or seven. All rows come once before one comes
        again.
        """
        each = Fraction(str(self.replay)) * batch_size
        places = floor(batch * each), floor((batch + 1) * each)
        return (self.num_rows + _dealt(self.num_earlier, f"{seed} replay", *places)).tolist()


def _per_epoch(count: int, weight: float) -> int:
    return max(1, round(Fraction(str(weight)) * count)) if count else 0


def held_out_bound(hashes: NDArray[np.int64], validation: float | int) -> int:
    """Return the bound below which hashes of prompts are held out: a share, or a number of prompts.

    A number (of 1 or more) is for the rows that are there. Kept with the run, the bound holds for
    rows that come later too, of which it takes the same share: no row ever changes sides.
    """
    if isinstance(validation, float):
        return floor(Fraction(str(validation)) * _HASHES)
    found = np.unique(hashes)
    return _HASHES if validation > len(found) else 1 + int(found[validation - 1])


def prompt_hashes(examples: Iterable[Example]) -> NDArray[np.int64]:
    """Return `Example.prompt_hash` of each: rows of one prompt are held out together."""
    return np.fromiter((example.prompt_hash for example in examples), np.int64)


def example_hashes(rows: Rows) -> NDArray[np.int64]:
    """Return for every example a hash of all that it says, wherever it stands."""
    return np.fromiter((hash_of(rows.content(k)) for k in range(len(rows))), np.int64, len(rows))


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


# --- the order of an epoch, a pure function of (seed, epoch), cut into batches on demand ---


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: its rows in order, and the order of their batches (None: as they lie)."""

    rows: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, index: int) -> list[int]:
        """Return the rows of one batch; the batch of the last rows may be smaller."""
        place = index if self.batches is None else int(self.batches[index])
        rows: list[int] = self.rows[
            place * self.batch_size : (place + 1) * self.batch_size
        ].tolist()
        return rows


def epoch_order(
    lengths: NDArray[np.integer], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> EpochOrder:
    """Return the order of one epoch, in which every row comes once.

    `group_by_length` shuffles the rows, sorts windows of 32 batches by length, and shuffles the
    batches.
    """
    generator = seeded(f"{seed} {epoch}")
    rows = torch.randperm(len(lengths), generator=generator).numpy()
    if not group_by_length:
        return EpochOrder(rows, None, batch_size)
    windows = np.arange(len(rows)) // (_WINDOW * batch_size)
    rows = rows[np.lexsort((lengths[rows], windows))]  # stable, by window and then by length
    num_batches = -(-len(rows) // batch_size)
    batches = torch.randperm(num_batches, generator=generator).numpy()
    return EpochOrder(rows, batches, batch_size)
