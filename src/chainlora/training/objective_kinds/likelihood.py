"""The likelihood of completions, or of the right candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine, Kind, num_terms
from chainlora.evaluation.evaluate import Evaluation, evaluate


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


OBJECTIVES = {
    "completion": LanguageModelling("completion"),
    "candidates": LanguageModelling("candidates"),
}
