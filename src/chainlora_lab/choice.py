"""Choosing hyper-parameters on validation rows.

Test scores never reach this file: it is handed `Trial`s, which have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chainlora.evaluation.metrics import is_higher_better
from chainlora_lab.expansion import Point


@dataclass(frozen=True)
class Trial:
    """What the choice may see of one tuning run.

    `metrics` are those of the validation rows, None if the run diverged.
    """

    task: str
    method: str
    point: Point
    metrics: Mapping[str, float] | None
    metric: str


def choose(trials: Iterable[Trial], metric: str | None = None) -> list[dict[str, Any]]:
    """Return one record per (task, method): the best point, and what it was chosen from.

    The best point has the best mean validation score. One that diverged under any seed scores
    worst. Ties go to the lower validation loss, then to the first in the grid.

    A record has `task`, `method`, `metric`, `chosen` (key → value; None if every point diverged)
    and `tried` (for each point its mean, its value under each seed and the number of runs).
    """
    groups: dict[tuple[str, str], dict[Point, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault((trial.task, trial.method), {}).setdefault(trial.point, []).append(trial)
    records = []
    for (task, method), by_point in groups.items():
        runs = [trial for own in by_point.values() for trial in own]
        # a sequence that diverged cannot know the metric of its rows
        name = metric or next((each for each in runs if each.metrics), runs[0]).metric
        tried, best = list[dict[str, Any]](), None
        for point, own in by_point.items():
            score, loss = _mean(own, name), _mean(own, "loss")
            key = (-score if is_higher_better(name) else score, loss)
            if math.isfinite(score) and (best is None or key < best[0]):
                best = (key, dict(point))
            mean = score if math.isfinite(score) else None
            tried.append({"point": dict(point), "mean": mean, "runs": len(own)})
            if len(own) > 1:
                tried[-1]["values"] = [(trial.metrics or {}).get(name) for trial in own]
        record = {"task": task, "method": method, "metric": name, "chosen": best and best[1]}
        records.append(record | {"tried": tried})
    return records


def _mean(trials: Sequence[Trial], name: str) -> float:
    worst = -math.inf if is_higher_better(name) else math.inf
    return fmean((trial.metrics or {}).get(name, worst) for trial in trials)


def extensions(
    record: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], limits: Mapping[str, int]
) -> list[Point]:
    """Return the points to try next: beyond an end of the grid, where the best point lies at it.

    The new value continues the last two geometrically. `limits` says how many values a key may gain
    beyond each end of its grid.
    """
    chosen = record["chosen"] or {}
    found: list[Point] = []
    for key in (key for key in limits if key in grid and key in chosen):
        value = _beyond(key, record, grid[key], limits[key])
        if value is not None:
            found.append(tuple((chosen | {key: value}).items()))
    return found


def _beyond(key: str, record: Mapping[str, Any], grid: Sequence[float], limit: int) -> float | None:
    """Return the next value of a key beyond the end that was chosen; None if it is no end."""
    chosen = record["chosen"]
    points = [each["point"] for each in record["tried"]]
    tried = sorted({point[key] for point in points if point == chosen | {key: point[key]}})
    if len(tried) < 2 or chosen[key] not in (tried[0], tried[-1]):
        return None
    lowest = chosen[key] == tried[0]
    end, neighbour = (tried[0], tried[1]) if lowest else (tried[-1], tried[-2])
    if sum(v < min(grid) if lowest else v > max(grid) for v in tried) >= limit:
        return None
    value = float(f"{end * end / neighbour:.2g}")  # two digits: a rate that a person would write
    if all(isinstance(each, int) for each in grid):
        value = int(value)
    return value if value > 0 and value not in tried else None
