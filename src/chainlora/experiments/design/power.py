"""What the size of an experiment lets it say, before a run is paid for."""

from __future__ import annotations

from chainlora.experiments.design.schema import Experiment
from chainlora.experiments.report.statistics import LEVEL, least_pairs


def undecidable(experiment: Experiment) -> str | None:
    """Return a sentence where so few seeds and so many comparisons can decide nothing; None where
    they can."""
    num_seeds, num_tasks, num_pairs = (
        len(each) for each in (experiment.seeds, experiment.tasks, experiment.pairs)
    )
    if not num_pairs:
        return None
    by_task = least_pairs(num_tasks * num_pairs)
    if num_seeds >= by_task:
        return None
    pooled = num_tasks > 1 and num_seeds * num_tasks >= least_pairs(num_pairs)
    place = "on any one task (over all of them together they may)" if pooled else "anything"
    return (
        f"{num_seeds} seeds cannot decide {place}, however clear the results: an exact test "
        "corrected for "
        f"{num_tasks * num_pairs} comparisons needs {by_task} for {LEVEL:.0%}"
    )
