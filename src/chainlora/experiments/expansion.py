"""From an experiment to its cells: task × method × hyper-parameters × seed, one run config each.

A cell's config is base ← task ← method ← grid point ← seed, merged key by key. Its id is a hash of
that config (`config_id`), so a cell that was done once is never done again, under whatever
experiment or folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from chainlora.config.loading import make_config
from chainlora.config.schema import RunConfig
from chainlora.data.tasks import REPORTED_OF_TEXT, check_split_files, load_task
from chainlora.errors import ConfigError
from chainlora.experiments.methods import apply_recipe, merge_trees
from chainlora.experiments.schema import Experiment

Point = tuple[tuple[str, Any], ...]
_OF_TRAINING = ("train", "chain", "recipe")  # sections that mean nothing where nothing is trained


@dataclass(frozen=True)
class Cell:
    """One run of an experiment; `point` has the grid keys and their values, in the grid's order."""

    task: str
    method: str
    seed: int
    point: Point
    config: RunConfig
    phase: str = "final"

    @cached_property
    def id(self) -> str:
        """Hash of the config."""
        return config_id(self.config)

    def __str__(self) -> str:
        point = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in self.point)
        return f"{self.task} {self.method} seed={self.seed}{point}"


def expand(
    experiment: Experiment, choices: Mapping[tuple[str, str], Point] | None = None
) -> list[Cell]:
    """Return the cells of an experiment, in the order they are best run.

    Without `choices`: every cell that its grid could ask for, the tuning cells first. With them
    (task, method → chosen point): the final cells only, all methods of a seed before the next seed,
    so that an interrupted run is balanced; a (task, method) without a choice has none.

    Raises ConfigError for a cell that could not run.
    """
    expansion = Expansion(experiment)
    if choices is not None:
        return expansion.finals(choices)
    tuning = expansion.tuning()
    tuned = {cell.id for cell in tuning}
    return tuning + [cell for cell in expansion.all_finals() if cell.id not in tuned]


class Expansion:
    """The cells of one experiment, each built once: a config takes milliseconds to check."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._points = {method: points(experiment, method) for method in experiment.methods}
        self._cells: dict[tuple[str, str, int, str, str], Cell] = {}

    def tuning(self, added: Mapping[tuple[str, str], Sequence[Point]] | None = None) -> list[Cell]:
        """Return the cells that choose a point: of the grid, and of points `added` beyond it."""
        grown = added or {}
        return _unique(
            self.cell(task, method, seed, point, "tune")
            for seed in self.experiment.tuning_seeds
            for task in self.experiment.tasks
            for method in self.experiment.methods
            if len(self._points[method]) > 1
            for point in [*self._points[method], *grown.get((task, method), ())]
        )

    def finals(self, choices: Mapping[tuple[str, str], Point]) -> list[Cell]:
        """Return the final cells at the chosen points."""
        return _unique(
            self.cell(task, method, seed, choices[task, method])
            for seed, task, method in self._triples()
            if (task, method) in choices
        )

    def all_finals(self) -> list[Cell]:
        """Return the final cells at every point of the grid."""
        return _unique(
            self.cell(task, method, seed, point)
            for seed, task, method in self._triples()
            for point in self._points[method]
        )

    def first_points(self, *, only: bool = False) -> dict[tuple[str, str], Point]:
        """Return the first point of each grid; with `only`, of the grids that have no other."""
        return {
            (task, method): found[0]
            for task in self.experiment.tasks
            for method, found in self._points.items()
            if len(found) == 1 or not only
        }

    def _triples(self) -> Iterable[tuple[int, str, str]]:
        for seed, task, method in itertools.product(
            self.experiment.seeds, self.experiment.tasks, self.experiment.methods
        ):
            if _uses_seed(self.experiment, method, seed):
                yield seed, task, method

    def cell(self, task: str, method: str, seed: int, point: Point, phase: str = "final") -> Cell:
        """Return one cell. Raises ConfigError if it could not run."""
        key = (task, method, seed, repr(point), phase)
        if key not in self._cells:
            self._cells[key] = _cell(self.experiment, task, method, seed, point, phase)
        return self._cells[key]


def points(experiment: Experiment, method: str) -> list[Point]:
    """Return the grid points of a method; one empty point if it has nothing to tune."""
    grid = {
        key: values
        for key, values in experiment.grid(method).items()
        if _trains(experiment, method) or key.split(".")[0] not in _OF_TRAINING
    }
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _unique(cells: Iterable[Cell]) -> list[Cell]:
    return list({(cell.task, cell.method, cell.seed, cell.id): cell for cell in cells}.values())


def _trains(experiment: Experiment, method: str) -> bool:
    recipe = merge_trees(experiment.base, experiment.method_tree(method)).get("recipe")
    return recipe is None or recipe.get("links", 1) != 0


def _uses_seed(experiment: Experiment, method: str, seed: int) -> bool:
    """A model that is not trained scores the same under every training seed: one is enough."""
    return (
        _trains(experiment, method)
        or experiment.seed_keys != ("train.seed",)
        or seed == experiment.seeds[0]
    )


def _cell(
    experiment: Experiment, task: str, method: str, seed: int, point: Point, phase: str
) -> Cell:
    tree = merge_trees(
        experiment.base, _task_tree(task, experiment.tasks[task]), experiment.method_tree(method)
    )
    for key, value in [*point, *((key, seed) for key in experiment.seed_keys)]:
        tree = merge_trees(tree, _nest(key, value))
    try:
        config = make_config(apply_recipe(tree))
    except ConfigError as error:
        raise ConfigError(f"task {task}, method {method}: {error}") from None
    _check_rows(task, config)
    if phase == "tune":
        _check_metric(task, config, experiment.tune.metric)
    return Cell(task, method, seed, point, config, phase)


def _check_rows(task: str, config: RunConfig) -> None:
    if config.data.task is not None:
        _check_task(config.data.task, config.data.dir)
    if config.data.train is not None and not (config.data.validation or config.data.test):
        raise ConfigError(
            f"task {task}: methods are compared on rows they do not train on (got none); give "
            "data.test or data.validation"
        )


def _check_metric(task: str, config: RunConfig, metric: str | None) -> None:
    named = config.data.task
    reported = load_task(named).reported if named is not None else REPORTED_OF_TEXT
    if metric is not None and metric not in reported:
        raise ConfigError(
            f"task {task}: `tune.metric` must be one of {', '.join(reported)} (got {metric!r})"
        )


@lru_cache(maxsize=64)
def _check_task(name: str, dir: str | None) -> None:
    task = load_task(name)
    if dir is not None:
        check_split_files(task, dir)


def _task_tree(name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    data = keys.get("data") or {}
    named = "task" in data or "train" in data
    return merge_trees({} if named else {"data": {"task": name}}, keys)


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


# --- names of cells ---


def config_id(config: RunConfig) -> str:
    """Return twelve hex digits that name what a config computes.

    Hashed are its values other than the defaults, so that a new key with a default renames no cell;
    places and watchers are left out. A file named by the config (rows, a task of the user's own)
    counts by its content. Of a shipped task only the name counts.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree.pop("output", None)
    tree["data"].pop("dir", None)
    for key in ("task", "train", "validation", "test"):
        path = Path(tree["data"].get(key) or "")
        if path.is_file():
            tree["data"][key] = _content(path, path.stat().st_mtime_ns)
    for key in ("save_every", "log_every", "trackers"):
        tree.get("train", {}).pop(key, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> str:
    """Return a hash of a file as it was at the time `changed`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
