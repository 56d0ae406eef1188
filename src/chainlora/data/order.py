"""The order of rows in an epoch: a pure function of (seed, epoch), cut into batches on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chainlora.models.modes import seeded

# Rows are sorted by length within this many batches: long enough that lengths are alike, short
# enough that the order stays random.
_WINDOW = 32


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: its rows in order, and the order of their batches (None: as they lie)."""

    rows: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches."""
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
