"""Which rows each optimizer step sees: a pure function of the config and the step's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.order import EpochOrder, epoch_order
from chainlora.data.rows import Rows
from chainlora.errors import ConfigError
from chainlora.knots.numbers import between

# Epochs whose order is kept: the one in progress, the next one (steps are packed ahead) and the
# first one (whose first batch is the probe of every knot).
_KEPT_EPOCHS = 3


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows each optimizer step sees: a pure function of the step's number."""

    lengths: tuple[int, ...]  # steps per link
    steps_per_epoch: int
    row_lengths: NDArray[np.integer]
    config: TrainConfig

    @property
    def num_steps(self) -> int:
        """Steps of the whole chain."""
        return sum(self.lengths)

    def batches(self, step: int) -> list[list[int]]:
        """Row indices of each micro-batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order, count = self._order(epoch), self.config.gradient_accumulation
        first = within * count
        return [order.batch(index) for index in range(first, min(first + count, len(order)))]

    def steps_of(self, num_tokens: float) -> int:
        """Return the number of steps, from the start, that have read `num_tokens` tokens."""
        epochs, rest = divmod(num_tokens, int(self.row_lengths.sum()))
        step, last = int(epochs) * self.steps_per_epoch, int(epochs + 1) * self.steps_per_epoch
        while rest > 0 and step < last:
            rest -= sum(int(self.row_lengths[batch].sum()) for batch in self.batches(step))
            step += 1
        return step

    @cached_property
    def _order(self) -> Callable[[int], EpochOrder]:
        train, lengths = self.config, self.row_lengths

        @lru_cache(maxsize=_KEPT_EPOCHS)
        def order(epoch: int) -> EpochOrder:
            return epoch_order(lengths, train.batch_size, train.seed, epoch, train.group_by_length)

        return order


def make_plan(config: RunConfig, examples: Rows) -> Plan:
    """Turn what the config says of each link's length into steps.

    Fractional epochs and tokens round at the knots, the total exactly. For `minutes`, which
    `training.budget` measures, links have one step each until then.
    """
    chain, train = config.chain, config.train
    if chain.ranks and not examples:
        raise ConfigError(
            f"training needs rows (got none beside {config.data.shots} demonstrations); lower "
            "data.shots or give more"
        )
    num_batches = math.ceil(len(examples) / train.batch_size)
    per_epoch = math.ceil(num_batches / train.gradient_accumulation)
    plan = Plan((1,) * len(chain.ranks), per_epoch, examples.lengths, train)
    if chain.minutes is not None:
        return plan
    if chain.steps is not None:
        lengths, said = chain.steps, "steps"
    elif chain.tokens is not None:
        lengths, said = (
            between([plan.steps_of(sum_) for sum_ in accumulate(chain.tokens)]),
            "tokens",
        )
    else:
        ends = [round(end * per_epoch) for end in accumulate(chain.epochs or ())]
        lengths, said = between(ends), "epochs"
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"every link must have at least one step (got {list(lengths)} from {said} "
            f"{list(getattr(chain, said) or ())} of {per_epoch} steps an epoch); give it a larger "
            "share"
        )
    return replace(plan, lengths=lengths)
