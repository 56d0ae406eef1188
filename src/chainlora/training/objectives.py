"""What a run learns: how examples become a batch, a batch a loss, and how the result is scored.

An objective is found by the name that data or `train.loss` give it (`Splits.loss`). A new one is a
file in `objective_kinds`, or comes from a plug-in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.examples import Example
from chainlora.data.splits import learned_by
from chainlora.data.tasks import load_task
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError
from chainlora.evaluation.evaluate import Evaluation
from chainlora.knots.driver import check_policy
from chainlora.registry import entries, entry, load_plugins
from chainlora.training import objective_kinds
from chainlora.training.optimizers import OPTIMIZERS


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
# your own is added by a plug-in (`registry`).
OBJECTIVES: dict[str, Objective | Callable[[TrainConfig], Objective]] = entries(
    objective_kinds, "OBJECTIVES"
)


def make_objective(name: str, config: TrainConfig) -> Objective:
    found = entry(OBJECTIVES, "train.loss", name)
    return found(config) if callable(found) else found


def check_names(config: RunConfig) -> None:
    """Load the plug-ins of a config, and look for its objective, optimizer and knot policy.

    Raises ConfigError for a plug-in that cannot be loaded, and for a name that nobody registered.
    """
    load_plugins(config.plugins)
    data, loss = config.data, config.train.loss
    key = "train.loss" if loss is not None or data.task is None else f"loss` of task `{data.task}"
    entry(OBJECTIVES, key, learned_by(data, loss))
    if loss == "candidates" and (data.task is None or load_task(data.task).completion is not None):
        raise ConfigError(
            "`train.loss: candidates` ranks the candidates of a task",
            f"task: {data.task or 'null'}, without candidates",
            "set train.loss: null",
        )
    entry(OPTIMIZERS, "train.optimizer", config.train.optimizer)
    if config.chain.knots is not None:
        check_policy(config.chain.knots)
