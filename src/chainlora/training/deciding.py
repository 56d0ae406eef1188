"""Decide the open numbers of a run before its first step; compute the reference of DPO.

Open numbers are lengths, soft knots, warm-up and metric (`knots.numbers`). The reference is the
score of every pair before training. Both are saved in the run directory, so that a resume uses the
same ones and no second model is needed in memory.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from chainlora.chain.adapters.layer_facts import num_trained
from chainlora.chain.adapters.targets import matched_modules
from chainlora.data.kept import SPLITS
from chainlora.data.rows import ReferencedRows, Rows
from chainlora.knots.driver import Knots
from chainlora.knots.numbers import Numbers, Spacings, some_of, spacings
from chainlora.training.events import ReferenceScored
from chainlora.training.run import Run
from chainlora.training.step import restart_warmup, warn_of_long_warmup

logger = logging.getLogger(__name__)

_CHUNK = 2000  # rows of a reference in memory at once


def decide(run: Run) -> None:
    """Give a run its numbers: the saved ones, or new ones, which are saved."""
    known = run.work.draft.training.numbers if run.work is not None else None
    numbers = known or _new_numbers(run)
    if numbers.path != str(run.engine.path):
        logger.warning(
            f"the run began with batches {numbers.path} and resumes with batches "
            f"{run.engine.path}: results are equal up to rounding, not to the bit"
        )
    decided = {key: getattr(numbers, key) for key in ("restart_warmup_steps", "select_metric")}
    train = run.train.model_copy(update=decided)
    run.config = run.config.model_copy(update={"train": train})
    run.batches = replace(run.batches, lengths=numbers.lengths)
    memory = run.progress.memory
    run.knots = Knots(run.chain, run.config.chain, numbers, memory=memory, first=run.first)
    if known is None and not run.is_inside_link:
        run.save_point()


def _new_numbers(run: Run) -> Numbers:
    chain, train = run.config.chain, run.train
    lengths = run.batches.lengths
    warn_of_long_warmup(train, lengths)
    soft: Spacings = ()
    if chain.knots is not None and lengths:
        soft = spacings(chain.knots, lengths, _tokens_per_parameter(run))
    return Numbers(
        lengths=lengths,
        knots=soft,
        restart_warmup_steps=restart_warmup(train),
        select_metric=train.select_metric or run.splits.metric,
        path=str(run.engine.path),
    )


def _tokens_per_parameter(run: Run) -> list[float]:
    """Return the training tokens of a step per trained parameter, for each link."""
    rows = run.batches.mixture.epoch(run.train.seed, 0).tolist()
    sample = some_of(rows)
    per_row = sum(run.splits.train[row].num_learned for row in sample) / len(sample)
    # not `batch_size`: the last step of an epoch may have few rows
    per_step = per_row * len(rows) / run.batches.steps_per_epoch
    model, links = run.chain.model, run.config.chain.links()
    return [per_step / num_trained(link.rank, matched_modules(model, link)) for link in links]


def take_reference(run: Run) -> None:
    """Give each row of a run its reference; a resumed run reads it from disk."""
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
    scores: list[list[float]] = []
    for first in range(0, len(rows), _CHUNK):

        def report(done: int, _: int, first: int = first) -> None:
            run.listener(ReferenceScored(0, split, first + done, (first + done) / len(rows)))

        scores += run.engine.scores(rows[first : first + _CHUNK], progress=report)
    return torch.tensor(scores, dtype=torch.float32)
