"""Whether a link is kept: it must lower the loss on validation rows by more than chance would.

Rows are compared one by one, before the link and after its knot, so that what they differ in among
themselves does not count. A link that is rejected is dropped: the weights are exactly the earlier
ones, and the chain ends there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.metrics import cross_entropy


@dataclass(frozen=True)
class Gain:
    """By how much a link lowered the loss of a validation row, in nats."""

    mean: float
    standard_error: float  # of that mean; infinite for a single row

    @property
    def is_clear(self) -> bool:
        """Say whether the link is worth keeping."""
        return self.mean > self.standard_error


def gain(before: Evaluation, after: Evaluation) -> Gain:
    """Return what a link brought, from evaluations of the same rows."""
    pairs = zip(before.predictions, after.predictions, strict=True)
    gains = [row_loss(one) - row_loss(other) for one, other in pairs]
    mean = math.fsum(gains) / len(gains)
    if len(gains) < 2:
        return Gain(mean, math.inf)
    variance = math.fsum((each - mean) ** 2 for each in gains) / (len(gains) - 1)
    return Gain(mean, math.sqrt(variance / len(gains)))


def row_loss(prediction: dict[str, Any]) -> float:
    """Return a row's loss: of its right candidate among all of them, or a token's on average."""
    scores, label = prediction["scores"], prediction["label"]
    return -scores[0] if label is None else cross_entropy(scores, label)
