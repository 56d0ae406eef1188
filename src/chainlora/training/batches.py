"""Which rows each optimizer step sees: a pure function of the config and the step's number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.mixture import EpochOrder, Mixture, epoch_order
from chainlora.data.rows import Rows
from chainlora.errors import ConfigError
from chainlora.knots.numbers import between

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batches:
    """Which rows each optimizer step sees: a pure function of the step's number."""

    lengths: tuple[int, ...]  # steps per link
    steps_per_epoch: int
    row_lengths: NDArray[np.integer]
    config: TrainConfig
    mixture: Mixture

    @property
    def num_steps(self) -> int:
        return sum(self.lengths)

    def batches(self, step: int) -> list[list[int]]:
        """Return the row indices of each micro-batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order, count = self._order(epoch), self.config.gradient_accumulation
        places = range(within * count, min((within + 1) * count, len(order)))
        before, size, seed = epoch * len(order), self.config.batch_size, self.config.seed
        return [
            order.batch(place) + self.mixture.added(size, seed, before + place) for place in places
        ]

    def steps_of(self, num_tokens: float) -> int:
        """Return the number of steps, from the start, that read `num_tokens` tokens."""
        epoch, rest = 0, num_tokens
        if self.mixture.is_even:
            epochs, rest = divmod(num_tokens, self._tokens(self.mixture.epoch(0, 0)))
            epoch = int(epochs)
        while rest >= (tokens := self._tokens(self._order(epoch).rows)):
            epoch, rest = epoch + 1, rest - tokens
        step = epoch * self.steps_per_epoch
        last = step + self.steps_per_epoch
        while rest > 0 and step < last:
            rest -= sum(self._tokens(batch) for batch in self.batches(step))
            step += 1
        return step

    def _tokens(self, rows: Sequence[int] | NDArray[np.integer]) -> int:
        indices = np.asarray(rows)
        own = indices[indices < self.mixture.num_rows]  # rows of earlier stages do not count
        return int(self.row_lengths[own].sum())

    @cached_property
    def _order(self) -> Callable[[int], EpochOrder]:
        train = self.config

        # three epochs: the current one, the next one (steps are packed ahead), and the first one
        # (its first batch is the probe of every knot)
        @lru_cache(maxsize=3)
        def order_of(epoch: int) -> EpochOrder:
            rows = self.mixture.epoch(train.seed, epoch)
            order = epoch_order(
                self.row_lengths[rows], train.batch_size, train.seed, epoch, train.group_by_length
            )
            return replace(order, rows=rows[order.rows])

        return order_of


def make_batches(config: RunConfig, examples: Rows, mixture: Mixture | None = None) -> Batches:
    """Return the batches of a run, with the length of each link in steps.

    `mixture` says which examples an epoch reads; by default all, once. Lengths in epochs or tokens
    are cumulated before rounding, so the total is exact to one step.
    """
    chain, train = config.chain, config.train
    mixture = mixture or Mixture((len(examples),), (1.0,))
    if chain.ranks and not mixture.num_rows:
        got = f"none beside {config.data.shots} demonstrations"
        raise ConfigError("training needs rows", got, "lower data.shots, or give more rows")
    num_batches = math.ceil(mixture.per_epoch / train.batch_size)
    per_epoch = math.ceil(num_batches / train.gradient_accumulation)
    size = train.batch_size * train.gradient_accumulation
    if chain.ranks and size > mixture.per_epoch:
        logger.warning(
            f"a step reads up to {size} rows (train.batch_size), and an epoch has "
            f"{mixture.per_epoch}: an epoch is one step; for more steps, lower train.batch_size"
        )
    plan = Batches((1,) * len(chain.ranks), per_epoch, examples.lengths, train, mixture)
    if chain.steps is not None:
        lengths, unit = chain.steps, "steps"
    elif chain.tokens is not None:
        ends = [plan.steps_of(end) for end in accumulate(chain.tokens)]
        lengths, unit = between(ends), "tokens"
    else:
        ends = [round(end * per_epoch) for end in accumulate(chain.epochs or ())]
        lengths, unit = between(ends), "epochs"
    if any(length < 1 for length in lengths):
        given = f"{unit} {list(getattr(chain, unit) or ())} of {per_epoch} steps an epoch"
        got, remedy = f"{list(lengths)} from {given}", "give it a larger share"
        raise ConfigError("every link must have at least one step", got, remedy)
    return replace(plan, lengths=lengths)
