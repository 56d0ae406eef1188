"""What the size of an experiment lets it say, before a run is paid for."""

from __future__ import annotations

from chainlora.experiments.design.schema import Experiment
from chainlora.experiments.statistics.power import LEVEL
from chainlora.experiments.statistics.sign_flip import least_pairs


def notes(experiment: Experiment) -> list[str]:
    """Return what should be known before this experiment runs, one sentence each."""
    found = [undecidable(experiment), tuned_on_test_seeds(experiment)]
    return [note for note in found if note is not None]


def num_comparisons(experiment: Experiment) -> int:
    """Return how many comparisons are corrected together on the tasks one by one."""
    alone = experiment.primary is not None and len(experiment.tasks) == 1
    return len(experiment.tasks) * (len(experiment.pairs) - alone)


def undecidable(experiment: Experiment) -> str | None:
    """Return a sentence where so few seeds and so many comparisons can decide nothing."""
    num_seeds, num_tasks = len(experiment.seeds), len(experiment.tasks)
    together = num_comparisons(experiment)
    if not together:
        return None
    by_task = least_pairs(together, LEVEL)
    if num_seeds >= by_task:
        return None
    num_pairs = together // num_tasks
    pooled = num_tasks > 1 and num_seeds * num_tasks >= least_pairs(num_pairs, LEVEL)
    place = "on any one task (over all of them together they may)" if pooled else "anything"
    beside = " beside the primary comparison" if experiment.primary else ""
    return (
        f"{num_seeds} seeds cannot decide {place}{beside}, however clear the results: an exact "
        f"test corrected for {together} comparisons needs {by_task} for {LEVEL:.0%}"
    )


def tuned_on_test_seeds(experiment: Experiment) -> str | None:
    """Return a sentence where seeds that choose hyper-parameters are compared as well."""
    tuned = any(
        len(values) > 1
        for method in experiment.methods
        for values in experiment.grid(method).values()
    )
    shared = [seed for seed in experiment.tuning_seeds if seed in experiment.seeds]
    if not tuned or not shared:
        return None
    seeds = (
        f"seeds {', '.join(map(str, shared))} choose" if shared[1:] else f"seed {shared[0]} chooses"
    )
    return (
        f"{seeds} hyper-parameters and {'are' if shared[1:] else 'is'} compared as well; "
        "`tune.seeds` of their own keep the comparison free of that choice"
    )
