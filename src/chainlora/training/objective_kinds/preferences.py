"""Losses of pairs: direct preference optimisation, and odds ratios beside the likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from chainlora.config.schema import TrainConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.head import candidate_scores
from chainlora.engine.packing import PackedBatch
from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs, orpo_losses, with_whole_row
from chainlora.training.objective_kinds.likelihood import LanguageModelling


class DPO(LanguageModelling):
    """The chosen answer of a pair must gain more on its reference than the rejected one.

    The reference is the start of the run (arXiv 2305.18290, equation 7).

    With the rewards r of `rewards` and the smoothing ε, the loss of a pair is
    −(1 − ε)·log σ(r_chosen − r_rejected) − ε·log σ(r_rejected − r_chosen).
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__("candidates")  # terms are counted by examples
        self.beta, self.smoothing = config.dpo_beta, config.dpo_label_smoothing

    def rewards(self, engine: Engine, batch: PackedBatch) -> Tensor:
        """Return β·log(π/π_ref) [E, 2], float32, of the chosen and the rejected answers."""
        gains = engine.at_head(candidate_scores, batch) - batch.reference  # of a token, on average
        return self.beta * (gains * batch.sequence_length).view(-1, 2)

    def loss(self, engine: Engine, batch: PackedBatch) -> Tensor:
        chosen, rejected = self.rewards(engine, batch).unbind(1)
        margin = chosen - rejected
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        return -((1 - self.smoothing) * right + self.smoothing * wrong).sum()

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        scores = engine.scores(examples, progress=options["progress"])
        return judge_pairs(examples, scores, [each.reference for each in examples], self.beta)


class ORPO(LanguageModelling):
    """The chosen row is learned, and its answer must have larger odds than the rejected one.

    The loss of a pair is that of `orpo_losses` (arXiv 2403.07691); there is no reference.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__("candidates")  # terms are counted by examples
        self.beta = config.orpo_beta

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        """Return a micro-batch as packed batches, in which a pair is three sequences."""
        return super().collate(engine, list(map(with_whole_row, examples)))

    def loss(self, engine: Engine, batch: PackedBatch) -> Tensor:
        scores = engine.at_head(candidate_scores, batch).view(-1, 3)
        return orpo_losses(scores, self.beta).sum()

    def evaluate(self, engine: Engine, examples: Sequence[Example], **options: Any) -> Evaluation:
        return judge_odds(engine, examples, self.beta, options["progress"])


OBJECTIVES = {"dpo": DPO, "orpo": ORPO}
