"""Which rows each optimizer step sees: a pure function of the config and the step's number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.encoding import epoch_batches
from chainlora.data.examples import Example
from chainlora.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Which rows each optimizer step sees: a pure function of the step's number."""

    lengths: tuple[int, ...]  # steps per link
    steps_per_epoch: int
    row_lengths: tuple[int, ...]
    config: TrainConfig

    @property
    def num_steps(self) -> int:
        """Steps of the whole chain."""
        return sum(self.lengths)

    def first_step(self, link: int) -> int:
        """Number of the link's first step."""
        return sum(self.lengths[:link])

    def batches(self, step: int) -> list[list[int]]:
        """Row indices of each micro-batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        train = self.config
        batches = epoch_batches(
            self.row_lengths, train.batch_size, train.seed, epoch, train.group_by_length
        )
        return batches[
            within * train.gradient_accumulation : (within + 1) * train.gradient_accumulation
        ]


def make_plan(config: RunConfig, examples: list[Example]) -> Plan:
    """Turn epochs per link into steps per link; fractional epochs round at the knots, the total
    exactly."""
    train = config.train
    if config.chain.ranks and not examples:
        raise ConfigError(
            f"training needs rows (got none beside {config.data.shots} demonstrations); lower "
            "data.shots or give more"
        )
    num_batches = math.ceil(len(examples) / train.batch_size)
    per_epoch = math.ceil(num_batches / train.gradient_accumulation)
    epochs = config.chain.epochs or ()
    if config.chain.steps is not None:
        lengths = config.chain.steps
    else:
        ends = [round(sum(epochs[: link + 1]) * per_epoch) for link in range(len(epochs))]
        lengths = tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"every link must have at least one step (got {list(lengths)} from epochs "
            f"{list(epochs)} of {per_epoch} steps); give it a larger share"
        )
    return Plan(lengths, per_epoch, tuple(sum(map(len, e.sequences)) for e in examples), train)
