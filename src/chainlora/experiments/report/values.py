"""What a cell's numbers are in a report: scores in per cent, losses as they are. Pure functions.

A difference is this less that, in the metric's own unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chainlora.evaluation.metrics import is_higher_better
from chainlora.experiments.execution.results import Results

Cell = Mapping[str, Any]
Value = Callable[[Cell], float | None]
OVERALL = "all tasks"


def scale(metric: str) -> float:
    """Return the factor between a metric and what is shown."""
    return 100.0 if is_higher_better(metric) else 1.0


def digits(metric: str) -> int:
    """Return how many decimals a metric, or a difference of it, is shown with."""
    return 2 if is_higher_better(metric) else 4


def shown_score(cell: Cell) -> float:
    """Return a cell's score as shown: per cent, or a loss."""
    return float(cell["score"]) * scale(cell["metric"])


def held_out_loss(cell: Cell) -> float | None:
    """Return a cell's loss on the rows it is scored on; None for written answers."""
    loss = (cell.get(cell["score_split"]) or {}).get("loss")
    return None if loss is None else float(loss)


def cells_of(results: Results, task: str, method: str) -> list[dict[str, Any]]:
    """Return the final cells of a method on a task."""
    return [cell for cell in results.finals if cell["task"] == task and cell["method"] == method]


def has_one_score(results: Results, task: str, method: str) -> bool:
    """Return whether all seeds give one score: nothing is trained, and seeds draw no rows."""
    cells = cells_of(results, task, method)
    by_training_alone = results.experiment.get("seed_keys", ["train.seed"]) == ["train.seed"]
    return by_training_alone and bool(cells) and not cells[0]["ranks"]


def by_seed(
    results: Results, task: str, method: str, value: Value = shown_score
) -> dict[int, float]:
    """Return a method's values on a task by seed; what trains nothing has one value for all."""
    found = {
        cell["seed"]: number
        for cell in cells_of(results, task, method)
        if (number := value(cell)) is not None
    }
    if found and has_one_score(results, task, method):
        found = dict.fromkeys(results.experiment["seeds"], next(iter(found.values())))
    return found


def missing_cells(results: Results) -> list[str]:
    """Return task, method and seeds of the final cells that are neither there nor diverged."""
    missing = []
    diverged = {(c["task"], c["method"], c["seed"]) for c in diverged_finals(results)}
    for task in results.experiment["tasks"]:
        for method in results.experiment["methods"]:
            have = by_seed(results, task, method).keys()
            seeds = [
                seed for seed in results.experiment["seeds"] if (task, method, seed) not in diverged
            ]
            lacking = [str(seed) for seed in seeds if seed not in have]
            if lacking:
                missing.append(f"{task} {method}: seeds {', '.join(lacking)}")
    return missing


def diverged_finals(results: Results) -> list[dict[str, Any]]:
    """Return the final cells whose loss stopped being finite."""
    return [
        cell for cell in results.cells if cell["phase"] == "final" and cell["status"] == "diverged"
    ]
