"""The reference of preferences: what the model as a run begins makes of every pair.

It is computed once, before the first step, and kept in the run directory. So no second model is in
memory, and knots, soft knots and other starts of a link leave it as it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from chainlora.data.rows import ReferencedRows, Rows
from chainlora.data.splits import SPLITS
from chainlora.training.events import ReferenceScored
from chainlora.training.run import Run

_CHUNK = 2000  # rows in memory at once


def take_reference(run: Run) -> None:
    """Give each row of a run its reference, from disk where the run has begun."""
    splits: dict[str, Rows] = {name: getattr(run.splits, name) for name in SPLITS}
    known = run.work.load_reference() if run.work is not None else None
    if known is None:
        known = {name: _scores(run, name, rows) for name, rows in splits.items()}
        if run.work is not None:
            run.work.save_reference(known)
    train, validation, test = (
        ReferencedRows(rows, known[name].numpy()) for name, rows in splits.items()
    )
    run.splits = replace(run.splits, train=train, validation=validation, test=test)


def _scores(run: Run, split: str, rows: Rows) -> Tensor:
    """Return the mean log-probability per token of both answers of each pair, [rows, 2] float32."""
    found: list[list[float]] = []
    for first in range(0, len(rows), _CHUNK):

        def tell(done: int, _: int, first: int = first) -> None:
            run.listener(ReferenceScored(0, split, first + done, (first + done) / len(rows)))

        found += run.engine.scores(rows[first : first + _CHUNK], progress=tell)
    return torch.tensor(found, dtype=torch.float32)
