"""What a run settles before its first step, and keeps when it is resumed.

These are the numbers that its config leaves open (`knots.numbers`), and for DPO the reference: the
scores of every pair by the model as the run begins. The reference is computed once and kept in the
run directory, so no second model is in memory.
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
from chainlora.knots.numbers import Numbers, Spacings, say_what_to_expect, some_of, spacings
from chainlora.training.events import ReferenceScored
from chainlora.training.run import Run
from chainlora.training.step import restart_warmup, say_what_stays_low

logger = logging.getLogger(__name__)

_CHUNK = 2000  # rows of a reference in memory at once


def decide(run: Run) -> None:
    """Give a run its numbers: those that it began with, or new ones, which are recorded."""
    known = run.work.draft.training.numbers if run.work is not None else None
    numbers = known or _new_numbers(run)
    if numbers.path != str(run.engine.path):
        logger.warning(
            f"the run began with batches {numbers.path} and goes on with batches "
            f"{run.engine.path}: the same to rounding, not to bits"
        )
    decided = {
        "restart_warmup_steps": numbers.restart_warmup_steps,
        "select_metric": numbers.select_metric,
    }
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
    say_what_stays_low(train, lengths)
    soft: Spacings = ()
    if chain.knots is not None and lengths:
        learned = _learned_a_step(run)
        say_what_to_expect(chain.knots, lengths[0] * learned[0])
        soft = spacings(chain.knots, lengths, learned)
    return Numbers(
        lengths=lengths,
        knots=soft,
        restart_warmup_steps=restart_warmup(train),
        select_metric=train.select_metric or run.splits.metric,
        path=str(run.engine.path),
    )


def _learned_a_step(run: Run) -> list[float]:
    """Return the tokens that a step learns, as some rows have them, by trained parameter of each
    link."""
    rows = run.batches.mixture.epoch(run.train.seed, 0).tolist()
    some = some_of(rows)
    tokens = sum(run.splits.train[row].num_learned for row in some) / len(some)
    # the last step of an epoch may have few rows
    a_step = tokens * len(rows) / run.batches.steps_per_epoch
    model, links = run.chain.model, run.config.chain.links()
    return [a_step / num_trained(link.rank, matched_modules(model, link)) for link in links]


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
