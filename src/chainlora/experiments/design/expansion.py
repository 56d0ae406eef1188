"""From an experiment to its cells: task × method × hyper-parameters × seed, each one run config
with a stable id.

A cell's config is base ← task ← method ← grid point ← seed, merged key by key. Its id is a hash of
that config, places and watchers left out, so a cell that was done once is never done again, under
whatever experiment or folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from chainlora.config.loading import make_config
from chainlora.config.schema import RunConfig
from chainlora.data.tasks import REPORTED_OF_TEXT, check_split_files, load_task
from chainlora.errors import ConfigError
from chainlora.experiments.design.schema import Experiment
from chainlora.experiments.methods import apply_recipe, merge_trees

Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """One run of an experiment. `point` holds the grid keys and their values, in the grid's
    order."""

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


def config_id(config: RunConfig) -> str:
    """Return twelve hex digits that name what a config computes.

    Hashed are its values other than the defaults, so that a new key with a default renames no cell;
    places and watchers are left out. A file named by the config (rows, a task of the user's own)
    counts by what is in it. Of a shipped task only the name counts.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree.pop("output", None)
    tree["data"].pop("dir", None)
    for key in ("task", "train", "validation", "test"):
        path = Path(tree["data"].get(key) or "")
        if path.is_file():
            tree["data"][key] = _content(path, path.stat().st_mtime_ns)
    for key in ("save_every", "trackers"):
        tree.get("train", {}).pop(key, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> str:
    """Return a hash of a file as it was at the time `changed`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def expand(
    experiment: Experiment, choices: Mapping[tuple[str, str], Point] | None = None
) -> list[Cell]:
    """Return the cells of an experiment, in the order they are best run.

    Without `choices`: every cell that could be asked for, the tuning cells first. With it (task,
    method → chosen point): the final cells only, all methods of a seed before the next seed, so
    that an interrupted run is balanced; a (task, method) without a choice has none. Raises
    ConfigError for a cell that could not run.
    """
    if choices is None:
        found = expand_tuning(experiment)
        tuned = {cell.id for cell in found}
        return found + [cell for cell in _all_finals(experiment) if cell.id not in tuned]
    cells = [
        _cell(experiment, task, method, seed, choices[task, method])
        for seed in experiment.seeds
        for task in experiment.tasks
        for method in experiment.methods
        if (task, method) in choices and _uses_seed(experiment, method, seed)
    ]
    return _unique(cells)


def expand_tuning(experiment: Experiment) -> list[Cell]:
    """Return the cells that choose a point; none where the grid leaves one point only."""
    return _unique(
        [
            _cell(experiment, task, method, seed, point, phase="tune")
            for seed in experiment.tuning_seeds
            for task in experiment.tasks
            for method in experiment.methods
            if len(points(experiment, method)) > 1
            for point in points(experiment, method)
        ]
    )


def points(experiment: Experiment, method: str) -> list[Point]:
    """Return the grid points of a method; one empty point if it has nothing to tune (or trains
    nothing)."""
    grid = {
        key: values
        for key, values in experiment.grid(method).items()
        if _trains(experiment, method) or key.split(".")[0] not in ("train", "chain", "recipe")
    }
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _all_finals(experiment: Experiment) -> list[Cell]:
    return _unique(
        [
            _cell(experiment, task, method, seed, point)
            for seed in experiment.seeds
            for task in experiment.tasks
            for method in experiment.methods
            if _uses_seed(experiment, method, seed)
            for point in points(experiment, method)
        ]
    )


def _unique(cells: Sequence[Cell]) -> list[Cell]:
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
    experiment: Experiment, task: str, method: str, seed: int, point: Point, phase: str = "final"
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
    if config.data.task is not None:
        _check_task(config.data.task, config.data.dir)
    if config.data.train is not None and not (config.data.validation or config.data.test):
        raise ConfigError(
            f"task {task}: methods are compared on rows they do not train on (got none); give "
            "data.test "
            "or data.validation"
        )
    metric = experiment.tune.metric
    reported = (
        load_task(config.data.task).reported if config.data.task is not None else REPORTED_OF_TEXT
    )
    if phase == "tune" and metric is not None and metric not in reported:
        raise ConfigError(
            f"task {task}: `tune.metric` must be one of {', '.join(reported)} (got {metric!r})"
        )
    return Cell(task, method, seed, point, config, phase)


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
