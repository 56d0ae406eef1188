"""What a report is made from: results, and what follows from them, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.comparisons import Comparison, compare_all, compare_losses
from chainlora.experiments.report.curves import Curve, difference_curves, loss_curves
from chainlora.experiments.report.summaries import Summary, summarise_all


@dataclass(frozen=True)
class Facts:
    """An experiment's results with their summaries and comparisons."""

    results: Results

    @cached_property
    def summaries(self) -> list[Summary]:
        """Return a summary of each method on each task."""
        return summarise_all(self.results)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Return the paired differences in score."""
        return compare_all(self.results)

    @cached_property
    def losses(self) -> list[Comparison]:
        """Return the paired differences in held-out loss."""
        return compare_losses(self.results)

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that have a score."""
        return list(dict.fromkeys(summary.task for summary in self.summaries))

    def curves(self, task: str) -> list[Curve]:
        """Return the validation loss of each method against steps."""
        return loss_curves(self.results, task)

    def curve_differences(self, task: str) -> list[Curve]:
        """Return the paired differences of these losses against steps."""
        return difference_curves(self.results, task)
