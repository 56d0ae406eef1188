"""What a change of the weights brought on rows that were scored before it and after it.

Rows are compared one by one, so that what they differ in among themselves does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.metrics import TEXT_METRICS, cross_entropy, is_higher_better


@dataclass(frozen=True)
class Gain:
    """By how much a change improved a metric, on average over the rows."""

    mean: float
    standard_error: float  # of that mean; infinite for a single row

    @property
    def is_clear(self) -> bool:
        """Say whether it is better by more than its standard error."""
        return self.mean > self.standard_error


def gain(before: Evaluation, after: Evaluation, metric: str = "loss") -> Gain:
    """Return what a change brought, from evaluations of the same rows.

    A loss per token weighs rows by their tokens, as the metric does. A metric that is no mean over
    rows has a gain without standard error.
    """
    sign = 1 if is_higher_better(metric) else -1
    pairs = zip(values(before, metric), values(after, metric), strict=True)
    gains = [sign * (now - then) for then, now in pairs]
    if not gains:
        return Gain(sign * (after.metrics[metric] - before.metrics[metric]), 0.0)
    weights = weights_of(after, metric)
    return Gain(_mean(gains, weights), standard_error(gains, weights))


def values(found: Evaluation, metric: str) -> list[float]:
    """Return what is averaged over rows by `weights_of`; nothing of a metric that is no such mean.

    The loss of a row is that of its right candidate among all, or a token's on average.
    """
    rows = found.predictions
    if metric == "accuracy":
        return [_share(row) for row in rows]
    if metric == "loss":
        return [_loss(row) for row in rows]
    if metric in TEXT_METRICS:
        judge = TEXT_METRICS[metric]
        return [judge(row.get("answer", row["prediction"]), row["references"]) for row in rows]
    return []


def weights_of(found: Evaluation, metric: str) -> list[int]:
    """Return how much each row counts in the mean: of a loss per token, its tokens."""
    return [row.get("tokens", 1) if metric == "loss" else 1 for row in found.predictions]


def standard_error(numbers: Sequence[float], weights: Sequence[int]) -> float:
    """Return that of a weighted mean, by linearisation; infinite for a single number."""
    if len(numbers) < 2:
        return math.inf
    mean, pairs = _mean(numbers, weights), zip(numbers, weights, strict=True)
    squares = math.fsum((weight * (each - mean)) ** 2 for each, weight in pairs)
    return math.sqrt(squares * len(numbers) / (len(numbers) - 1)) / sum(weights)


def _mean(numbers: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(map(mul, numbers, weights)) / sum(weights)


def _share(row: dict[str, Any]) -> float:
    """Return 1 where a row is right, and a half of a pair whose answers are ranked the same."""
    return 0.5 if row["prediction"] is None else float(row["prediction"] == row["label"])


def _loss(row: dict[str, Any]) -> float:
    scores, label = row["scores"], row["label"]
    if "loss" in row:
        return float(row["loss"])
    return float(-scores[0]) if label is None else cross_entropy(scores, label)
