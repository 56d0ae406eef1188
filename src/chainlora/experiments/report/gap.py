"""How much of the gap between doing nothing and tuning everything a method closes."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.values import by_seed
from chainlora.experiments.statistics.intervals import mean_interval


@dataclass(frozen=True)
class Share:
    """The share of the gap that a method closes on a task, over paired seeds.

    Its interval takes each seed's share of the *mean* gap, so that it is of a mean and not of a
    ratio of two noisy numbers.
    """

    task: str
    method: str
    num_seeds: int
    mean: float
    low: float
    high: float
    gap: float


def gap_ends(results: Results) -> tuple[str, str] | None:
    """Return (floor, ceiling): as the experiment says, else zero-shot and full fine-tuning."""
    named = results.experiment.get("gap")
    if named:
        return named[0], named[1]
    floor = _first(results, lambda cell: not cell["ranks"] and not _data(cell).get("shots"))
    ceiling = _first(results, lambda cell: _chain(cell).get("tune") == "full")
    return (floor, ceiling) if floor and ceiling else None


def _first(results: Results, condition: Any) -> str | None:
    fit = {cell["method"] for cell in results.finals if condition(cell)}
    return next((method for method in results.experiment["methods"] if method in fit), None)


def _chain(cell: dict[str, Any]) -> dict[str, Any]:
    return cell["config"].get("chain", {})


def _data(cell: dict[str, Any]) -> dict[str, Any]:
    return cell["config"].get("data", {})


def shares(results: Results) -> list[Share]:
    """Return each method's share of the gap on each task; none where the gap is not measured."""
    ends = gap_ends(results)
    if ends is None:
        return []
    found = []
    for task in results.experiment["tasks"]:
        floor, ceiling = (by_seed(results, task, end) for end in ends)
        for method in results.experiment["methods"]:
            if method not in ends:
                own = by_seed(results, task, method)
                share = _share(task, method, own, floor, ceiling)
                found += [share] if share else []
    return found


def _share(
    task: str,
    method: str,
    own: dict[int, float],
    floor: dict[int, float],
    ceiling: dict[int, float],
) -> Share | None:
    seeds = sorted(own.keys() & floor.keys() & ceiling.keys())
    if not seeds:
        return None
    gap = fmean(ceiling[seed] - floor[seed] for seed in seeds)
    if gap == 0:
        return None
    values = [(own[seed] - floor[seed]) / gap for seed in seeds]
    return Share(task, method, len(seeds), fmean(values), *mean_interval(values), gap=gap)
