"""The rows of an epoch and their order: weights of files, held-out rows, rows of earlier stages.

All functions are pure and independent of the number of processes: (seed, step) decides the rows of
a step, and only the prompt of a row decides whether it is held out.
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

# Rows are sorted by length within this many batches: enough batches for similar lengths, few enough
# for a random order.
_WINDOW = 32
_HASHES = 1 << 63  # the number of possible hashes (`hash_of`)


@dataclass(frozen=True)
class Mixture:
    """The rows that training reads: weighted files, and rows of earlier stages.

    Rows are numbered through all files in order; the `num_earlier` rows of earlier stages follow.
    `replay` is the number of earlier rows added to a batch, as a share of the batch size.
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
        """Return how many rows of the files an epoch reads, the same in every epoch."""
        return sum(map(_per_epoch, self.counts, self.weights))

    @property
    def is_even(self) -> bool:
        """Return whether every epoch reads the same rows."""
        files = zip(self.counts, self.weights, strict=True)
        return all(_per_epoch(count, weight) % max(count, 1) == 0 for count, weight in files)

    def epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the rows of an epoch.

        A weight is copies per epoch: a file of n rows and weight w gives round(w·n) rows to every
        epoch, at least one. Every row of a file is read once before any row is read again, across
        epochs.
        """
        parts, first = [], 0
        for file, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            size = _per_epoch(count, weight)
            dealt = _dealt(count, f"{seed} file {file}", epoch * size, (epoch + 1) * size)
            parts.append(first + np.sort(dealt))
            first += count
        return np.concatenate(parts)

    def added(self, batch_size: int, seed: int, batch: int) -> list[int]:
        """Return the rows of earlier stages that are added to batch number `batch` of the run.

        Batch k of B rows gets floor((k + 1)·p·B) − floor(k·p·B) rows for a share p: 2 % of batches
        of 8 is one row in every six or seven batches. Every row is read once before any row is read
        again.
        """
        per_batch = Fraction(str(self.replay)) * batch_size
        places = floor(batch * per_batch), floor((batch + 1) * per_batch)
        return (self.num_rows + _dealt(self.num_earlier, f"{seed} replay", *places)).tolist()


def _per_epoch(count: int, weight: float) -> int:
    return max(1, round(Fraction(str(weight)) * count)) if count else 0


def held_out_bound(hashes: NDArray[np.int64], validation: float | int) -> int:
    """Return the bound below which hashes of prompts are held out: a share, or a number of them.

    The run keeps the bound and applies it to later rows too, of which it holds out the same share.
    Adding rows never moves existing rows.
    """
    if isinstance(validation, float):
        return floor(Fraction(str(validation)) * _HASHES)
    unique = np.unique(hashes)
    return _HASHES if validation > len(unique) else 1 + int(unique[validation - 1])


def prompt_hashes(examples: Iterable[Example]) -> NDArray[np.int64]:
    """Return `Example.prompt_hash` of each example."""
    return np.fromiter((example.prompt_hash for example in examples), np.int64)


def example_hashes(rows: Rows) -> NDArray[np.int64]:
    """Return the hash of the content of each example; row numbers do not count."""
    return np.fromiter((hash_of(rows.content(k)) for k in range(len(rows))), np.int64, len(rows))


def _dealt(count: int, name: str, start: int, end: int) -> NDArray[np.int64]:
    """Return items `start` to `end` of an endless sequence: all rows shuffled, then again, …"""
    if not count:
        return np.empty(0, np.int64)
    places = np.arange(start, end)
    rows = np.empty(len(places), np.int64)
    for deal in range(start // count, -(-end // count)):
        in_deal = places // count == deal
        rows[in_deal] = _shuffled(count, f"{name} {deal}")[places[in_deal] % count]
    return rows


@lru_cache(maxsize=8)
def _shuffled(count: int, name: str) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(count, generator=seeded(name)).numpy()
    return order


# --- the order of an epoch: a pure function of (seed, epoch) ---


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: its rows in order, and the order of their batches (None: unchanged)."""

    rows: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, index: int) -> list[int]:
        """Return the rows of one batch; the batch with the last rows may be smaller."""
        place = index if self.batches is None else int(self.batches[index])
        return self.rows[place * self.batch_size :][: self.batch_size].tolist()


def epoch_order(
    lengths: NDArray[np.integer], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> EpochOrder:
    """Return the order of one epoch, with every row once."""
    generator = seeded(f"{seed} {epoch}")
    rows = torch.randperm(len(lengths), generator=generator).numpy()
    if not group_by_length:
        return EpochOrder(rows, None, batch_size)
    # Shuffle the rows, sort windows of 32 batches by length, and shuffle the batches.
    windows = np.arange(len(rows)) // (_WINDOW * batch_size)
    rows = rows[np.lexsort((lengths[rows], windows))]  # stable, by window and then by length
    num_batches = -(-len(rows) // batch_size)
    batches = torch.randperm(num_batches, generator=generator).numpy()
    return EpochOrder(rows, batches, batch_size)
