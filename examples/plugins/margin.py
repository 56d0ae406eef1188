"""A hinge loss over candidates: an objective as a plug-in."""

from torch import Tensor

from chainlora.engine.engine import Engine
from chainlora.engine.head import candidate_scores
from chainlora.engine.packing import PackedBatch
from chainlora.training.objectives import OBJECTIVES, LanguageModelling


class Margin(LanguageModelling):
    """The right candidate's score must lead every other one by a margin."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__("candidates")
        self.margin = margin

    def loss(self, engine: Engine, batch: PackedBatch) -> Tensor:
        """Return the hinge loss, summed over the examples of the batch."""
        scores = engine.at_head(candidate_scores, batch)
        example = batch.sequence_example
        is_right = batch.labels[example] == batch.sequence_slot
        right = scores.new_zeros(batch.num_examples)
        right = right.index_put((example[is_right],), scores[is_right])
        return (self.margin + scores - right[example])[~is_right].clamp(min=0).sum()


OBJECTIVES["margin"] = Margin()
