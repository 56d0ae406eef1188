"""A method on a task over its seeds: scores, losses, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from chainlora.data.tasks import WORD_METRICS
from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.values import (
    Cell,
    cells_of,
    held_out_loss,
    scale,
    shown_score,
)
from chainlora.experiments.statistics.intervals import mean_sd


@dataclass(frozen=True)
class Summary:
    """A method on a task over its seeds, and its mean cost a run.

    Of `wall_s` the median is taken: machines pause. `others` are means of further metrics.
    """

    task: str
    method: str
    metric: str
    split: str
    num_seeds: int
    mean: float
    sd: float
    majority: float | None
    others: dict[str, float]
    validation: float | None
    held_out_loss: float | None
    train_loss: float | None
    point: dict[str, Any]
    ranks: tuple[int, ...]
    num_trained: float
    tokens: float
    wall_s: float
    peak_rss_mb: float | None


def summarise_all(results: Results) -> list[Summary]:
    """Return one summary per task and method that has final cells, in the experiment's order."""
    return [
        _summarise(task, method, cells)
        for task in results.experiment["tasks"]
        for method in results.experiment["methods"]
        if (cells := cells_of(results, task, method))
    ]


def _summarise(task: str, method: str, cells: Sequence[Cell]) -> Summary:
    first = cells[0]
    metric, majority = first["metric"], first.get("majority")
    mean, sd = mean_sd([shown_score(cell) for cell in cells])
    return Summary(
        task=task,
        method=method,
        metric=metric,
        split=first["score_split"],
        num_seeds=len(cells),
        mean=mean,
        sd=sd,
        majority=None if majority is None else 100 * majority,
        others=_other_metrics(cells, metric),
        validation=_mean([_validation(cell) for cell in cells]),
        held_out_loss=_mean([held_out_loss(cell) for cell in cells]),
        train_loss=_mean([cell["train_loss"] for cell in cells]),
        point=dict(first["point"]),
        ranks=tuple(first["ranks"]),
        num_trained=fmean(cell["trainable_parameters"] for cell in cells),
        tokens=fmean(cell["tokens"] for cell in cells),
        wall_s=median(cell["wall_s"] for cell in cells),
        peak_rss_mb=_mean([cell["peak_rss_mb"] for cell in cells]),
    )


def _other_metrics(cells: Sequence[Cell], metric: str) -> dict[str, float]:
    """Return the means of the metrics of words beside the main one (exact match beside F1)."""
    scored = [cell.get(cell["score_split"]) or {} for cell in cells]
    names = [name for name in WORD_METRICS if name != metric]
    return {
        name: 100 * fmean(values[name] for values in scored)
        for name in names
        if all(name in values for values in scored)
    }


def _validation(cell: Cell) -> float | None:
    value = (cell["validation"] or {}).get(cell["metric"])
    return None if value is None else value * scale(cell["metric"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
