"""Loss against steps: mean curves over seeds, and paired differences step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from chainlora_lab.report.values import cells_of, finite
from chainlora_lab.results import Results
from chainlora_lab.statistics.intervals import mean_interval

BySeed = dict[int, dict[int, float]]  # seed → step → loss


@dataclass(frozen=True)
class Curve:
    """Values over seeds: step → their mean and its interval, infinite where seeds allow none.

    `knots` are the steps at which the links of `method` end.
    """

    name: str
    method: str
    points: dict[int, tuple[float, float, float]]
    num_seeds: int
    knots: tuple[int, ...] = ()


def loss_curves(results: Results, task: str) -> list[Curve]:
    """Return the validation loss of each method against steps; none where no curve was kept."""
    by_method = [(name, _losses(results, task, name)) for name in results.experiment["methods"]]
    return [c for name, losses in by_method for c in _curve(results, task, name, name, losses)]


def difference_curves(results: Results, task: str) -> list[Curve]:
    """Return the method's loss less its rival's against steps, by seed: lower is better."""
    found = list[Curve]()
    for method, rival in results.experiment["pairs"]:
        one, other = (_losses(results, task, name) for name in (method, rival))
        paired = {
            seed: {
                step: loss - other[seed][step] for step, loss in own.items() if step in other[seed]
            }
            for seed, own in one.items()
            if seed in other
        }
        found += _curve(results, task, method, f"{method} − {rival}", paired)
    return found


def _losses(results: Results, task: str, method: str) -> BySeed:
    """Return the validation losses along the runs of a method; runs of one point have no curve."""
    by_seed = {
        cell["seed"]: {
            point["step"]: loss
            for point in cell.get("curve", ())
            if (loss := finite(point.get("loss"))) is not None
        }
        for cell in cells_of(results, task, method)
    }
    return {seed: losses for seed, losses in by_seed.items() if len(losses) > 1}


def _curve(results: Results, task: str, method: str, name: str, values: BySeed) -> Iterator[Curve]:
    """Yield the curve over the steps that all seeds have, if they have any."""
    values = {seed: losses for seed, losses in values.items() if losses}
    if not values or not (shared := set.intersection(*map(set, values.values()))):
        return
    columns = {step: [losses[step] for losses in values.values()] for step in sorted(shared)}
    points = {step: (fmean(own), *mean_interval(own)) for step, own in columns.items()}
    lengths = cells_of(results, task, method)[0].get("link_steps") or []
    yield Curve(name, method, points, len(values), tuple(accumulate(lengths[:-1])))
