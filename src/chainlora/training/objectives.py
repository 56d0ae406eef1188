"""Objectives: turn examples into batches, a batch into a loss, and score the result.

The name of an objective comes from the data or from `train.loss` (`Splits.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.examples import Example
from chainlora.data.splits import learned_by
from chainlora.data.tasks import load_task
from chainlora.engine.engine import Engine, Kind, num_terms
from chainlora.engine.head import candidate_scores
from chainlora.engine.packing import PackedBatch
from chainlora.errors import ConfigError
from chainlora.evaluation.evaluate import Evaluation, evaluate
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs, orpo_losses, with_whole_row
from chainlora.knots.driver import check_policy
from chainlora.registry import entry, load_plugins
from chainlora.training.optimizers import check_name


class Objective(Protocol):
    """The interface of an objective."""

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        """Return a micro-batch as packed batches; threads take one at a time."""

    def count(self, batch: Any) -> int:
        """Return the number of terms in the batch's loss."""

    def loss(self, engine: Engine, batch: Any) -> Tensor:
        """Return the loss of a batch, summed over its terms: a scalar, differentiable."""

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        """Return the metrics of `examples`; `options` are those of `evaluation.evaluate`.

        The option ``progress(rows_done, rows)`` is called after each batch.
        """


class LanguageModelling:
    """Next-token likelihood: of whole completions, or of the right candidate against the others."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        return [engine.pack(shard) for shard in engine.split(examples)]

    def count(self, batch: Any) -> int:
        return num_terms(batch, self.kind)

    def loss(self, engine: Engine, batch: Any) -> Tensor:
        return engine.loss(batch, self.kind)[0]

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        return evaluate(engine.model, examples, engine=engine, **options)


class DPO(LanguageModelling):
    """Raise the chosen answer of a pair above the rejected one, relative to a reference model.

    The reference is the model before the stage. With the rewards r of `rewards` and the smoothing
    ε, the loss of a pair is −(1 − ε)·log σ(r_chosen − r_rejected) − ε·log σ(r_rejected − r_chosen)
    (arXiv 2305.18290, equation 7).
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__("candidates")  # terms are counted by examples
        self.beta, self.smoothing = config.dpo_beta, config.dpo_label_smoothing

    def rewards(self, engine: Engine, batch: PackedBatch) -> Tensor:
        """Return β·log(π/π_ref) of the chosen and the rejected answers, [pairs, 2] float32."""
        # mean of an answer's tokens
        gains = engine.at_head(candidate_scores, batch) - batch.reference
        return self.beta * (gains * batch.sequence_length).view(-1, 2)

    def loss(self, engine: Engine, batch: PackedBatch) -> Tensor:
        chosen, rejected = self.rewards(engine, batch).unbind(1)
        margin = chosen - rejected
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        return -((1 - self.smoothing) * right + self.smoothing * wrong).sum()

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        scores = engine.scores(examples, progress=options["progress"])
        return judge_pairs(examples, scores, [row.reference for row in examples], self.beta)


class ORPO(LanguageModelling):
    """Learn the chosen row, and raise its odds above those of the rejected one (arXiv 2403.07691).

    The loss of a pair is `orpo_losses`. No reference is needed.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__("candidates")  # terms are counted by examples
        self.beta = config.orpo_beta

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        """Return a micro-batch as packed batches; a pair becomes three sequences."""
        return super().collate(engine, list(map(with_whole_row, examples)))

    def loss(self, engine: Engine, batch: PackedBatch) -> Tensor:
        scores = engine.at_head(candidate_scores, batch).view(-1, 3)  # [pairs, 3]
        return orpo_losses(scores, self.beta).sum()

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        return judge_odds(engine, examples, self.beta, options["progress"])


# Objectives by the name in `Splits.loss`. A class is made with the config's `train` section.
# Plug-ins add entries (`registry`).
OBJECTIVES: dict[str, Objective | Callable[[TrainConfig], Objective]] = {
    "completion": LanguageModelling("completion"),
    "candidates": LanguageModelling("candidates"),
    "dpo": DPO,
    "orpo": ORPO,
}


def make_objective(name: str, config: TrainConfig) -> Objective:
    """Return the objective of a name. Raises ConfigError for an unknown one."""
    objective = entry(OBJECTIVES, "train.loss", name)
    return objective(config) if callable(objective) else objective


def check_names(config: RunConfig) -> None:
    """Load the plug-ins of a config, and look up its objective, optimizer and knot policy.

    Raises ConfigError for a plug-in that cannot be loaded, and for unknown names.
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
    check_name(config.train.optimizer)
    if config.chain.knots is not None:
        check_policy(config.chain.knots)
