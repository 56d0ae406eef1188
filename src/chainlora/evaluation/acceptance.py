"""What a change of the weights brought on rows that were scored before it and after it.

Rows are compared one by one, so that what they differ in among themselves does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
        """Say whether it is better by more than chance would."""
        return self.mean > self.standard_error


def gain(before: Evaluation, after: Evaluation, metric: str = "loss") -> Gain:
    """Return what a change brought, from evaluations of the same rows.

    A metric that is no mean over rows has a gain without standard error.
    """
    sign = 1 if is_higher_better(metric) else -1
    pairs = zip(values(before, metric), values(after, metric), strict=True)
    gains = [sign * (now - then) for then, now in pairs]
    if not gains:
        return Gain(sign * (after.metrics[metric] - before.metrics[metric]), 0.0)
    return Gain(math.fsum(gains) / len(gains), standard_error(gains))


def values(found: Evaluation, metric: str) -> list[float]:
    """Return what each row adds to the mean; none of a metric that is no mean over rows.

    The loss of a row is that of its right candidate among all, or a token's on average.
    """
    rows = found.predictions
    if metric == "accuracy":
        return [_share(row) for row in rows]
    if metric == "loss":
        return [_loss(row) for row in rows]
    if metric in TEXT_METRICS and all("references" in row for row in rows):
        judge = TEXT_METRICS[metric]
        return [judge(row["prediction"], row["references"]) for row in rows]
    return []


def standard_error(numbers: Sequence[float]) -> float:
    """Return that of a mean; infinite for a single number."""
    if len(numbers) < 2:
        return math.inf
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((each - mean) ** 2 for each in numbers) / (len(numbers) - 1)
    return math.sqrt(variance / len(numbers))


def _share(row: dict[str, Any]) -> float:
    """Return 1 where a row is right, and a half of a pair whose answers are ranked the same."""
    return 0.5 if row["prediction"] is None else float(row["prediction"] == row["label"])


def _loss(row: dict[str, Any]) -> float:
    scores, label = row["scores"], row["label"]
    if "loss" in row:
        return float(row["loss"])
    return float(-scores[0]) if label is None else cross_entropy(scores, label)
