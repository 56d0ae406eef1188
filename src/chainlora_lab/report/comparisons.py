"""Paired differences of the methods compared, corrected together as they were planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from chainlora.evaluation.metrics import is_higher_better
from chainlora_lab.experiment import OVERALL
from chainlora_lab.report.values import (
    Summary,
    Value,
    by_seed,
    held_out_loss,
    num_planned,
    shown_score,
    summarise_all,
)
from chainlora_lab.results import Results
from chainlora_lab.statistics.pairs import Difference, compare_pairs

Key = tuple[str, str, str]  # task, method, rival
Family = dict[Key, list[float]]


@dataclass(frozen=True)
class Comparison:
    """A method against a rival on a task (or all of them together) by a value.

    `metric` is what the value is of; `num_comparisons` were corrected together; `is_primary` is the
    one named beforehand, which is tested alone. Of the `num_planned` pairs, `num_diverged` have a
    run that diverged: a mean over the others flatters a method that fails.
    """

    task: str
    method: str
    rival: str
    value: str
    metric: str
    difference: Difference
    num_comparisons: int
    is_primary: bool
    num_planned: int
    num_diverged: int

    @property
    def better(self) -> str:
        """Which side of 0 is the better one: ``below 0 is better``, or above."""
        return f"{'above' if is_higher_better(self.metric) else 'below'} 0 is better"

    @property
    def is_ahead(self) -> bool:
        mean = self.difference.mean
        return mean > 0 if is_higher_better(self.metric) else mean < 0


def compare_all(results: Results) -> list[Comparison]:
    """Return every pair's difference by score on every task, then over all tasks.

    A pair over all tasks pools its (task, seed) differences, of the seeds that all tasks have, so
    that tasks weigh alike; scores, losses and perplexities are not pooled with each other. Tasks
    one by one are one Holm family, all tasks together another; the primary comparison is tested
    alone.
    """
    return _compare(results, "score", shown_score, results.experiment["tasks"])


def compare_losses(results: Results) -> list[Comparison]:
    """Return the same by held-out loss, for the tasks whose metric is not the loss already."""
    metrics, tasks = _metrics(results), list[str]()
    for task in results.experiment["tasks"]:
        cells = [cell for cell in results.finals if cell["task"] == task]
        # a task without a cell yet is assumed to have held-out losses
        has_loss = not cells or any(held_out_loss(cell) is not None for cell in cells)
        if has_loss and is_higher_better(metrics.get(task)):
            tasks.append(task)
    return _compare(results, "held-out loss", held_out_loss, tasks)


def _compare(results: Results, name: str, value: Value, tasks: Sequence[str]) -> list[Comparison]:
    metrics, found = _metrics(results), list[Comparison]()
    every = next(iter(metrics.values()), "")
    for family, is_primary in _families(results, value, tasks):
        of = [metrics.get(key[0], every) if value is shown_score else "loss" for key in family]
        lower = [not is_higher_better(metric) for metric in of]
        differences = compare_pairs(list(family.values()), lower)
        for key, metric, difference in zip(family, of, differences, strict=True):
            if difference is not None:
                pairs = _planned(results, key, tasks)
                what = (name, metric, difference)
                found.append(Comparison(*key, *what, len(family), is_primary, *pairs))
    order, places = results.experiment["pairs"], [*tasks, OVERALL]
    found.sort(key=lambda c: (places.index(c.task), order.index([c.method, c.rival])))
    return found


def _families(results: Results, value: Value, tasks: Sequence[str]) -> list[tuple[Family, bool]]:
    """Return the sets of comparisons that are corrected together, and which is the primary one.

    The primary pair is a family by itself where it matters most: over all tasks where they are
    pooled, on the task where there is one. On single tasks of several it is one of many, and by
    the losses beside the scores too: of one question asked beforehand there is one answer.
    """
    pairs = [tuple(pair) for pair in results.experiment["pairs"]]
    by_task = {
        (task, method, rival): _differences(results, task, method, rival, value)
        for task in tasks
        for method, rival in pairs
    }
    single = {key: list(found.values()) for key, found in by_task.items()}
    metrics, pooled = _metrics(results), Family()
    known = [metrics[task] for task in tasks if task in metrics]
    is_alike = len({"score" if is_higher_better(each) else each for each in known}) == 1
    if len(tasks) > 1 and is_alike:
        for method, rival in pairs:
            own = [by_task[task, method, rival] for task in tasks]
            shared = sorted(set.intersection(*map(set, own)))  # seeds that all tasks have
            pooled[OVERALL, method, rival] = [each[seed] for each in own for seed in shared]
    primary = tuple(results.experiment.get("primary") or ()) if value is shown_score else ()
    last = pooled or single
    alone = {key: last.pop(key) for key in list(last) if key[1:] == primary}
    families = ((single, False), (pooled, False), (alone, True))
    return [(family, is_primary) for family, is_primary in families if family]


def _metrics(results: Results) -> dict[str, str]:
    return {cell["task"]: cell["metric"] for cell in results.finals}


def _planned(results: Results, key: Key, tasks: Sequence[str]) -> tuple[int, int]:
    """Return how many pairs a comparison is planned to have, and how many of them diverged."""
    own, methods = (tasks if key[0] == OVERALL else key[:1]), key[1:]
    diverged = {
        (cell["task"], cell["seed"])
        for cell in results.diverged
        if cell["task"] in own and cell["method"] in methods
    }
    return sum(num_planned(results, task, *methods) for task in own), len(diverged)


def _differences(
    results: Results, task: str, method: str, rival: str, value: Value
) -> dict[int, float]:
    """Return a method's values less its rival's, by seed."""
    one, other = (by_seed(results, task, name, value) for name in (method, rival))
    seeds = sorted(one.keys() & other.keys())[: num_planned(results, task, method, rival)]
    return {seed: one[seed] - other[seed] for seed in seeds}


# --- all of it ---


@dataclass(frozen=True)
class Facts:
    """An experiment's results with their summaries and comparisons."""

    results: Results

    @cached_property
    def summaries(self) -> list[Summary]:
        return summarise_all(self.results)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        return compare_all(self.results)

    @cached_property
    def losses(self) -> list[Comparison]:
        return compare_losses(self.results)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(summary.task for summary in self.summaries))
