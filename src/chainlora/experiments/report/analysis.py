"""From results to what a report says: summaries, paired differences, costs. Pure functions.

Scores are shown in per cent, losses as they are; differences are oriented so that positive is
better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from chainlora.data.tasks import WORD_METRICS
from chainlora.experiments.design.choice import LOWER_IS_BETTER
from chainlora.experiments.design.paper import paper_scores
from chainlora.experiments.execution.records import Results
from chainlora.experiments.report.statistics import Difference, compare_pairs, mean_sd

Cell = Mapping[str, Any]
Value = Callable[[Cell], float | None]
OVERALL = "all tasks"


@dataclass(frozen=True)
class Summary:
    """A method on a task over its seeds, and its mean cost per run (of `wall_s` the median:
    machines pause).

    `paper` is the paper's own score, with its sd where that is printed; `others` are means of
    further metrics.
    """

    task: str
    method: str
    metric: str
    split: str
    num_seeds: int
    mean: float
    sd: float
    majority: float | None
    paper: float | None
    paper_sd: float | None
    others: dict[str, float]
    validation: float | None
    held_out_loss: float | None
    train_loss: float | None
    point: dict[str, Any]
    ranks: tuple[int, ...]
    num_trained: float
    tokens: float
    flops: float
    flops_6nd: float
    wall_s: float
    peak_rss_mb: float


@dataclass(frozen=True)
class Comparison:
    """A method against a rival on a task (or all of them together) by a value, which is a
    `metric`."""

    task: str
    method: str
    rival: str
    value: str
    metric: str
    difference: Difference


def summarise_all(results: Results) -> list[Summary]:
    """Return one summary per task and method that has final cells, in the experiment's order."""
    table = results.experiment.get("paper")
    printed, spreads = paper_scores(table), paper_scores(table, "sd")
    found = []
    for task in results.experiment["tasks"]:
        for method in results.experiment["methods"]:
            cells = _cells(results, task, method)
            if cells:
                paper = (numbers.get(method, {}).get(task) for numbers in (printed, spreads))
                found.append(_summarise(task, method, cells, *paper))
    return found


def _summarise(
    task: str, method: str, cells: Sequence[Cell], paper: float | None, paper_sd: float | None
) -> Summary:
    first = cells[0]
    mean, sd = mean_sd([shown_score(cell) for cell in cells])
    majority = first.get("majority")
    validation = [(cell["validation"] or {}).get(first["metric"]) for cell in cells]
    return Summary(
        task,
        method,
        first["metric"],
        first["score_split"],
        len(cells),
        mean,
        sd,
        None if majority is None else 100 * majority,
        paper,
        paper_sd,
        {
            name: 100 * fmean(cell[cell["score_split"]][name] for cell in cells)
            for name in WORD_METRICS
            if name != first["metric"]
            and all(name in (cell.get(cell["score_split"]) or {}) for cell in cells)
        },
        _mean([None if value is None else value * scale(first["metric"]) for value in validation]),
        _mean([held_out_loss(cell) for cell in cells]),
        _mean([cell["train_loss"] for cell in cells]),
        dict(first["point"]),
        tuple(first["ranks"]),
        num_trained=fmean(cell["trainable_parameters"] for cell in cells),
        tokens=fmean(cell["tokens"] for cell in cells),
        flops=fmean(cell["flops"] for cell in cells),
        flops_6nd=fmean(cell["flops_6nd"] for cell in cells),
        wall_s=median(cell["wall_s"] for cell in cells),
        peak_rss_mb=fmean(cell["peak_rss_mb"] for cell in cells),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def scale(metric: str) -> float:
    """Return the factor between a metric and what is shown."""
    return 1.0 if metric in LOWER_IS_BETTER else 100.0


def digits(metric: str) -> int:
    """Return how many decimals a metric, or a difference of it, is shown with."""
    return 4 if metric in LOWER_IS_BETTER else 2


def shown_score(cell: Cell) -> float:
    """Return a cell's score as shown: per cent, or a loss."""
    return float(cell["score"]) * scale(cell["metric"])


def held_out_loss(cell: Cell) -> float | None:
    """Return a cell's loss on the rows it is scored on; None where it has none (generated
    answers)."""
    loss = (cell.get(cell["score_split"]) or {}).get("loss")
    return None if loss is None else float(loss)


def oriented_score(cell: Cell) -> float:
    """Return a cell's score as shown, negated where lower is better."""
    return -shown_score(cell) if cell["metric"] in LOWER_IS_BETTER else shown_score(cell)


def oriented_loss(cell: Cell) -> float | None:
    """Return a cell's negated held-out loss."""
    loss = held_out_loss(cell)
    return None if loss is None else -loss


def compare_all(results: Results) -> list[Comparison]:
    """Return every pair's paired difference by score on every task, then over all tasks: two Holm
    families.

    A pair over all tasks pools its (task, seed) differences, of the seeds that all of its tasks
    have, so that tasks weigh alike; tasks of unlike metrics are not pooled.
    """
    return _family(results, "score", oriented_score)


def compare_losses(results: Results) -> list[Comparison]:
    """Return the same by held-out loss, for the tasks whose metric is not the loss already."""
    return _family(results, "held-out loss", oriented_loss)


def _family(results: Results, name: str, value: Value) -> list[Comparison]:
    pairs = results.experiment["pairs"]
    metrics = {cell["task"]: cell["metric"] for cell in results.finals}
    tasks = results.experiment["tasks"]
    if value is oriented_loss:
        tasks = [
            task
            for task in tasks
            if metrics.get(task) not in LOWER_IS_BETTER and _has_loss(results, task)
        ]
    by_task = {
        (task, method, rival): _differences(results, task, method, rival, value)
        for task in tasks
        for method, rival in pairs
    }
    pooled = {}
    if (
        len(tasks) > 1
        and len({metrics[task] in LOWER_IS_BETTER for task in tasks if task in metrics}) == 1
    ):
        pooled = {
            (OVERALL, method, rival): _pool([by_task[task, method, rival] for task in tasks])
            for method, rival in pairs
        }
    found = []
    flat = {key: list(by_seed.values()) for key, by_seed in by_task.items()}
    for family in (flat, pooled):
        for key, difference in zip(family, compare_pairs(list(family.values())), strict=True):
            if difference is not None:
                metric = metrics.get(key[0]) or next(iter(metrics.values()))
                found.append(
                    Comparison(
                        *key, name, metric if value is oriented_score else "loss", difference
                    )
                )
    return found


def _has_loss(results: Results, task: str) -> bool:
    """Say whether a task has held-out losses: one with written answers has none; of one not begun
    it is assumed."""
    cells = [cell for cell in results.finals if cell["task"] == task]
    return not cells or any(held_out_loss(cell) is not None for cell in cells)


def _pool(by_task: Sequence[Mapping[int, float]]) -> list[float]:
    """Return the differences of all tasks that have any, over the seeds that all of these have."""
    begun = [by_seed for by_seed in by_task if by_seed]
    shared = set.intersection(*(set(by_seed) for by_seed in begun)) if begun else set()
    return [by_seed[seed] for by_seed in begun for seed in sorted(shared)]


def _differences(
    results: Results, task: str, method: str, rival: str, value: Value
) -> dict[int, float]:
    """Return a method's values less its rival's, by seed."""
    one, other = (scores_by_seed(results, task, name, value) for name in (method, rival))
    seeds = sorted(one.keys() & other.keys())
    if all(_has_one_score(results, task, name) for name in (method, rival)):
        seeds = seeds[:1]  # of two runs there is one difference, not one a seed
    return {seed: one[seed] - other[seed] for seed in seeds}


def _cells(results: Results, task: str, method: str) -> list[dict[str, Any]]:
    return [cell for cell in results.finals if cell["task"] == task and cell["method"] == method]


def _has_one_score(results: Results, task: str, method: str) -> bool:
    """Say whether a method scores the same under every seed: it trains nothing, and seeds draw no
    rows."""
    cells = _cells(results, task, method)
    by_training_alone = results.experiment.get("seed_keys", ["train.seed"]) == ["train.seed"]
    return by_training_alone and bool(cells) and not cells[0]["ranks"]


def scores_by_seed(
    results: Results, task: str, method: str, value: Value = shown_score
) -> dict[int, float]:
    """Return a method's values on a task by seed; one that trains nothing has one value for all
    seeds."""
    found = {
        cell["seed"]: number
        for cell in _cells(results, task, method)
        if (number := value(cell)) is not None
    }
    if found and _has_one_score(results, task, method):
        found = dict.fromkeys(results.experiment["seeds"], next(iter(found.values())))
    return found


def missing_cells(results: Results) -> list[str]:
    """Return task, method and seeds of the final cells that are neither there nor diverged."""
    missing = []
    diverged = {(c["task"], c["method"], c["seed"]) for c in diverged_finals(results)}
    for task in results.experiment["tasks"]:
        for method in results.experiment["methods"]:
            have = scores_by_seed(results, task, method).keys()
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
