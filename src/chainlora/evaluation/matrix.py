"""What a matrix of scores says about stages that were learned one after another.

R[i, j] is the score of stage j's rows in state i: after i stages, so that row 0 is the base. With T
stages (Lopez-Paz & Ranzato, arXiv 1706.08840; Chaudhry et al., arXiv 1801.10112):

    average             mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] − R[j, j]
    forgetting          mean over j < T of max over 0 < i < T of R[i, j], less R[T, j]

Rows of what was there before the first stage are a column of their own, learned in row 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from chainlora.evaluation.metrics import is_higher_better


@dataclass(frozen=True)
class MatrixSummary:
    """The numbers of the columns of one metric; None where they have no stage before the last.

    Of a metric that is the better the lower, the sign of every score is turned (`is_turned`): an
    average or a transfer above another is always the better one, a forgetting the worse.
    """

    metric: str
    stages: tuple[str, ...]
    is_turned: bool
    average: float
    backward_transfer: float | None
    forgetting: float | None

    def __str__(self) -> str:
        parts = [f"average {self.average:.4f}"]
        if self.backward_transfer is not None:
            parts.append(f"backward transfer {self.backward_transfer:+.4f}")
        if self.forgetting is not None:
            parts.append(f"forgetting {self.forgetting:+.4f}")
        return f"{'minus the ' * self.is_turned}{self.metric}: {', '.join(parts)}"


def summarise_matrix(
    scores: Sequence[Sequence[float]],
    stages: Sequence[str],
    metrics: Sequence[str],
    learned: Sequence[int] | None = None,
) -> list[MatrixSummary]:
    """Return a summary for each metric, in the order in which metrics occur.

    Args:
        scores: R, [T + 1][columns].
        stages: the name of each column.
        metrics: what each column is scored by; numbers of different ones are never averaged.
        learned: the row in which each column is learned; by default 1, 2, …, T.
    """
    found, last = [], len(scores) - 1
    rows = range(1, last + 1) if learned is None else learned
    for metric in dict.fromkeys(metrics):
        sign = 1 if is_higher_better(metric) else -1
        own = [j for j, each in enumerate(metrics) if each == metric]
        column = {j: [sign * row[j] for row in scores] for j in own}
        before = [j for j in own if rows[j] < last]
        transfers = [column[j][last] - column[j][rows[j]] for j in before]
        losses = [max(column[j][min(rows[j], 1) : last]) - column[j][last] for j in before]
        summary = MatrixSummary(
            metric,
            tuple(stages[j] for j in own),
            sign < 0,
            fmean(column[j][last] for j in own),
            fmean(transfers) if before else None,
            fmean(losses) if before else None,
        )
        found.append(summary)
    return found
