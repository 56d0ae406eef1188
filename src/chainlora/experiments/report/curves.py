"""Loss against steps: mean curves over seeds, and paired differences step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chainlora.experiments.report.values import cells_of
from chainlora.experiments.results import Results
from chainlora.experiments.statistics.intervals import mean_interval

BySeed = dict[int, dict[int, float]]  # seed → step → loss


@dataclass(frozen=True)
class Curve:
    """Values at steps over seeds: their mean, and the interval of the mean where seeds allow one.

    `knots` are the steps at which links end.
    """

    name: str
    steps: tuple[int, ...]
    means: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    num_seeds: int
    knots: tuple[int, ...] = ()


def loss_curves(results: Results, task: str) -> list[Curve]:
    """Return the validation loss of each method against steps; none where no curve was kept."""
    found = []
    for method in results.experiment["methods"]:
        values = losses_by_seed(results, task, method)
        if values:
            found.append(_curve(method, values, _knots(results, task, method)))
    return found


def difference_curves(results: Results, task: str) -> list[Curve]:
    """Return the method's loss less its rival's against steps, by seed: lower is better."""
    found = []
    for method, rival in results.experiment["pairs"]:
        one, other = (losses_by_seed(results, task, name) for name in (method, rival))
        paired: BySeed = {
            seed: {
                step: one[seed][step] - other[seed][step]
                for step in sorted(one[seed].keys() & other[seed].keys())
            }
            for seed in one.keys() & other.keys()
        }
        paired = {seed: values for seed, values in paired.items() if values}
        if paired:
            found.append(_curve(f"{method} − {rival}", paired, _knots(results, task, method)))
    return found


def losses_by_seed(results: Results, task: str, method: str) -> BySeed:
    """Return the validation losses along the runs of a method; runs of one point have no curve."""
    found = {}
    for cell in cells_of(results, task, method):
        values = {
            point["step"]: point["loss"] for point in cell.get("curve", ()) if "loss" in point
        }
        if len(values) > 1:
            found[cell["seed"]] = values
    return found


def _curve(name: str, values: BySeed, knots: tuple[int, ...]) -> Curve:
    """Return the curve over the steps that all seeds have."""
    steps = sorted(set.intersection(*(set(each) for each in values.values())))
    columns = [[each[step] for each in values.values()] for step in steps]
    ends = [mean_interval(column) for column in columns]
    return Curve(
        name,
        tuple(steps),
        tuple(fmean(column) for column in columns),
        tuple(low for low, _ in ends),
        tuple(high for _, high in ends),
        len(values),
        knots,
    )


def _knots(results: Results, task: str, method: str) -> tuple[int, ...]:
    """Return the steps at which links end, the last one left out."""
    cells: Sequence[Mapping[str, Any]] = cells_of(results, task, method)
    lengths = cells[0].get("link_steps") or [] if cells else []
    ends = [sum(lengths[: position + 1]) for position in range(len(lengths))]
    return tuple(ends[:-1])
