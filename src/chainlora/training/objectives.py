"""What a run learns: how examples become a batch, a batch a loss, and how the result is scored.

An objective is found by the name that data or `train.loss` give it (`Splits.loss`). A new one is a
file in `objective_kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from chainlora.config.schema import TrainConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.evaluation.evaluate import Evaluation
from chainlora.registry import entries
from chainlora.training import objective_kinds


class Objective(Protocol):
    """What the loop asks of an objective."""

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        """Return a micro-batch as the batches that threads take one by one."""

    def count(self, batch: Any) -> int:
        """Return the number of terms in the batch's loss."""

    def loss(self, engine: Engine, batch: Any) -> Tensor:
        """Return the loss of a batch, summed over its terms: a scalar, differentiable."""

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        """Return the metrics of `examples`; `options` are those of `evaluation.evaluate`.

        Its ``progress(rows_done, rows)`` is called after each batch.
        """


# By the name in `Splits.loss`: an objective, or the class of one that reads keys of `train`. One of
# your own can be added from outside.
OBJECTIVES: dict[str, Objective | Callable[[TrainConfig], Objective]] = entries(
    objective_kinds, "OBJECTIVES"
)


def make_objective(name: str, config: TrainConfig) -> Objective:
    """Return the objective of this name."""
    found = OBJECTIVES[name]
    return found(config) if callable(found) else found
