"""What a cell's numbers are in a report, and a method's over its seeds and along its steps.

Scores are in per cent, losses as they are; a difference is this less that, in the metric's unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from statistics import fmean, median
from typing import Any

from chainlora.config.schema import PAIR_LOSSES
from chainlora.evaluation.metrics import is_higher_better
from chainlora_lab.results import Results
from chainlora_lab.statistics.intervals import mean_interval, mean_sd

Cell = Mapping[str, Any]
Value = Callable[[Cell], float | None]
BySeed = dict[int, dict[int, float]]  # seed → step → loss


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
    """Return a cell's loss on the rows it is scored on; None for written answers and for pairs."""
    if _is_of_pairs(cell):
        return None
    return finite((cell.get(cell["score_split"]) or {}).get("loss"))


def _is_of_pairs(cell: Cell) -> bool:
    """Say whether a cell learned pairs: their losses are on the scales of their objectives."""
    return cell["config"].get("train", {}).get("loss") in PAIR_LOSSES


def finite(value: Any) -> Any:
    """Return a value; None for a number that means cannot take (the loss of a probability of 0)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def big(value: float) -> str:
    """Return a large count with three digits, such as 1.23e+09."""
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"


def cells_of(results: Results, task: str, method: str) -> list[dict[str, Any]]:
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


def nothing_chosen(results: Results) -> list[tuple[str, str]]:
    """Return each task and method that diverged at every point that was tried."""
    return [(c["task"], c["method"]) for c in results.choices if c["chosen"] is None]


def missing_cells(results: Results) -> list[str]:
    """Return task, method and seeds of the final cells that are neither there nor diverged."""
    missing, experiment, hopeless = [], results.experiment, nothing_chosen(results)
    diverged = {(c["task"], c["method"], c["seed"]) for c in results.diverged}
    for task, method in product(experiment["tasks"], experiment["methods"]):
        ended = {*by_seed(results, task, method)}
        ended |= {seed for seed in experiment["seeds"] if (task, method, seed) in diverged}
        lacking = [str(seed) for seed in experiment["seeds"] if seed not in ended]
        if lacking and (task, method) not in hopeless:
            missing.append(f"{task} {method}: seeds {', '.join(lacking)}")
    return missing


# --- over seeds ---


@dataclass(frozen=True)
class Summary:
    """A method on a task over its seeds, and its mean cost a run.

    Of `num_planned` seeds `num_seeds` trained to their end. Of `wall_s` the median is taken:
    machines pause. `others` are means of further metrics.
    """

    task: str
    method: str
    metric: str
    split: str
    num_seeds: int
    num_planned: int
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
    scored_tokens: float | None
    wall_s: float
    peak_rss_mb: float | None


def summarise_all(results: Results) -> list[Summary]:
    """Return one summary per task and method that has final cells, in the experiment's order."""
    return [
        _summarise(task, method, cells, num_planned(results, task, method))
        for task in results.experiment["tasks"]
        for method in results.experiment["methods"]
        if (cells := cells_of(results, task, method))
    ]


def num_planned(results: Results, task: str, *methods: str) -> int:
    """Return over how many seeds a method is planned, or a pair: one where nothing varies."""
    is_one = all(has_one_score(results, task, name) for name in methods)
    return 1 if is_one else len(results.experiment["seeds"])


def _summarise(task: str, method: str, cells: Sequence[Cell], planned: int) -> Summary:
    first = cells[0]
    metric, majority = first["metric"], _mean([cell.get("majority") for cell in cells])
    mean, sd = mean_sd([shown_score(cell) for cell in cells])
    validation = [(cell["validation"] or {}).get(metric) for cell in cells]
    return Summary(
        task=task,
        method=method,
        metric=metric,
        split=first["score_split"],
        num_seeds=len(cells),
        num_planned=planned,
        mean=mean,
        sd=sd,
        majority=None if majority is None else 100 * majority,
        others=_other_metrics(cells, metric),
        validation=_mean([None if v is None else v * scale(metric) for v in validation]),
        held_out_loss=_mean([held_out_loss(cell) for cell in cells]),
        train_loss=_mean([cell["train_loss"] for cell in cells]),
        point=dict(first["point"]),
        ranks=tuple(first["ranks"]),
        num_trained=fmean(cell["trainable_parameters"] for cell in cells),
        tokens=fmean(cell["tokens"] for cell in cells),
        scored_tokens=_mean([cell.get("scored_tokens") for cell in cells]),
        wall_s=median(cell["wall_s"] for cell in cells),
        peak_rss_mb=_mean([cell["peak_rss_mb"] for cell in cells]),
    )


def _other_metrics(cells: Sequence[Cell], metric: str) -> dict[str, float]:
    """Return the means of the metrics of words beside the main one (exact match beside F1)."""
    scored = [cell.get(cell["score_split"]) or {} for cell in cells]
    return {
        name: 100 * fmean(values[name] for values in scored)
        for name in ("em", "token_f1")
        if name != metric and all(name in values for values in scored)
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# --- along the steps: mean curves over seeds, and paired differences step by step ---


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
    """Return the validation losses along the runs of a method, by seed.

    Runs of one point have no curve, and pairs none that can be compared.
    """
    found = {
        cell["seed"]: {
            point["step"]: loss
            for point in cell.get("curve", ())
            if (loss := finite(point.get("loss"))) is not None
        }
        for cell in cells_of(results, task, method)
        if not _is_of_pairs(cell)
    }
    return {seed: losses for seed, losses in found.items() if len(losses) > 1}


def _curve(results: Results, task: str, method: str, name: str, values: BySeed) -> Iterator[Curve]:
    """Yield the curve over the steps that all seeds have, if they have any."""
    values = {seed: losses for seed, losses in values.items() if losses}
    if not values or not (shared := set.intersection(*map(set, values.values()))):
        return
    columns = {step: [losses[step] for losses in values.values()] for step in sorted(shared)}
    points = {step: (fmean(own), *mean_interval(own)) for step, own in columns.items()}
    lengths = cells_of(results, task, method)[0].get("link_steps") or []
    yield Curve(name, method, points, len(values), tuple(accumulate(lengths[:-1])))
