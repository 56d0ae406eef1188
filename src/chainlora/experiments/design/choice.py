"""Choosing hyper-parameters on validation rows.

Test scores never reach this file: it is handed `Trial`s, which have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chainlora.experiments.design.expansion import Point

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass(frozen=True)
class Trial:
    """What the choice may see of one tuning run; `metrics`: of the validation rows, None if it
    diverged."""

    task: str
    method: str
    point: Point
    metrics: Mapping[str, float] | None
    metric: str


def choose(trials: Iterable[Trial], metric: str | None = None) -> list[dict[str, Any]]:
    """Return one record per (task, method): the point of the best mean validation score, and what
    it was chosen from.

    A point that diverged under one seed scores worst. Ties go to the lower validation loss, then to
    the first in the grid. Records have `task`, `method`, `metric`, `chosen` (key → value) and
    `tried` (point, mean, number of runs). A (task, method) whose every point diverged has `chosen`
    None.
    """
    groups: dict[tuple[str, str], dict[Point, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault((trial.task, trial.method), {}).setdefault(trial.point, []).append(trial)
    return [
        _choose_one(task, method, by_point, metric) for (task, method), by_point in groups.items()
    ]


def _choose_one(
    task: str, method: str, by_point: Mapping[Point, Sequence[Trial]], metric: str | None
) -> dict[str, Any]:
    name = metric or next(trial.metric for trials in by_point.values() for trial in trials)
    tried, best = [], None
    for point, trials in by_point.items():
        score, loss = _mean(trials, name), _mean(trials, "loss")
        key = (score if name in LOWER_IS_BETTER else -score, loss)
        finite = math.isfinite(score)
        tried.append({"point": dict(point), "mean": score if finite else None, "runs": len(trials)})
        if finite and (best is None or key < best[0]):
            best = (key, point)
    return {
        "task": task,
        "method": method,
        "metric": name,
        "chosen": None if best is None else dict(best[1]),
        "tried": tried,
    }


def _mean(trials: Sequence[Trial], name: str) -> float:
    worst = math.inf if name in LOWER_IS_BETTER else -math.inf
    values = [
        worst if trial.metrics is None else trial.metrics.get(name, worst) for trial in trials
    ]
    return sum(values) / len(values)


def chosen_points(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Point]:
    """Return (task, method) → chosen point, of those that have one."""
    return {
        (record["task"], record["method"]): tuple(record["chosen"].items())
        for record in records
        if record["chosen"] is not None
    }
