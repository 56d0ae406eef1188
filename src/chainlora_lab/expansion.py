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
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from chainlora import RunConfig, make_config
from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.staging import make_stages
from chainlora.data.sources import find_file
from chainlora.data.splits import reported_of
from chainlora.errors import ConfigError
from chainlora.registry import plugin_digest
from chainlora_lab.experiment import Experiment
from chainlora_lab.loops import CellConfig
from chainlora_lab.methods import apply_recipe, list_methods, list_ways, merge_trees
from chainlora_lab.protocol import load_task

Pair = tuple[str, str]  # task, method
Point = tuple[tuple[str, Any], ...]  # the grid's keys and their values, in its order
_OF_TRAINING = ("train", "chain", "recipe")  # sections that mean nothing where nothing is trained


@dataclass(frozen=True)
class Cell:
    """One run of an experiment; its `id` is the hash of its config."""

    task: str
    method: str
    seed: int
    point: Point
    config: CellConfig
    id: str
    phase: str = "final"

    def __str__(self) -> str:
        point = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in self.point)
        return f"{self.task} {self.method} seed={self.seed}{point}"


FORMER_RANKS = [8, 8]  # `chain.ranks` when the cells of benchmarks/ were named; now 8 a length


def expand(experiment: Experiment) -> list[Cell]:
    """Return every cell that an experiment could ask for, those that choose a point first.

    Raises ConfigError for a cell that could not run.
    """
    expansion = Expansion(experiment)
    tuning = expansion.tuning()
    tuned = {cell.id for cell in tuning}
    return tuning + [cell for cell in expansion.finals(expansion.points) if cell.id not in tuned]


class Expansion:
    """The cells of one experiment, each built once: a config takes milliseconds to check.

    `points` are those of the grid, by task and method; one empty point where nothing is tuned.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.points: dict[Pair, list[Point]] = {
            (task, method): _points(experiment, method)
            for task, method in itertools.product(experiment.tasks, experiment.methods)
        }
        self._cells: dict[tuple[str, str, int, str], Cell] = {}
        self._reported: dict[str, tuple[str, ...]] = {}  # by task

    def tuning(self, added: Mapping[Pair, Sequence[Point]] | None = None) -> list[Cell]:
        """Return the cells that choose a point: of the grid, and of points `added` beyond it."""
        return _unique(
            replace(self._cell(*pair, seed, point), phase="tune")
            for seed in self.experiment.tuning_seeds
            for pair, points in self.points.items()
            if len(points) > 1
            for point in [*points, *(added or {}).get(pair, ())]
        )

    def finals(self, chosen: Mapping[Pair, Sequence[Point]]) -> list[Cell]:
        """Return the final cells at these points, none of a (task, method) that has none here.

        All methods of a seed come before the next seed: a run that is interrupted is balanced.
        """
        return _unique(
            self._cell(*pair, seed, point)
            for seed in self.experiment.seeds
            for pair in self.points
            # under other training seeds, a model that is not trained scores the same
            if seed == self.experiment.seeds[0]
            or self.experiment.seed_keys != ("train.seed",)
            or _trains(self.experiment, pair[1])
            for point in chosen.get(pair, ())
        )

    def _cell(self, task: str, method: str, seed: int, point: Point) -> Cell:
        key = (task, method, seed, repr(point))
        if key not in self._cells:
            config = _config(self.experiment, task, method, seed, point)
            chooses = len(self.points[task, method]) > 1
            for part in config.parts:
                self._check(task, part, chooses=chooses)
            _need_shared_split(task, config)
            if chooses and config.stages:
                self._check_sequence(task, config)
            self._cells[key] = Cell(task, method, seed, point, config, config_id(config))
        return self._cells[key]

    def _check(self, task: str, config: RunConfig, *, chooses: bool) -> None:
        """Refuse no rows to score or to choose on, an unknown task, and an unknown metric."""
        data, metric = config.data, self.experiment.tune.metric
        if data.train is not None and not (data.validation or data.test):
            rule = f"task {task}: methods are compared on rows they do not train on"
            raise ConfigError(rule, "none", "give data.test or data.validation")
        if chooses and data.train is not None and not data.validation:
            rule = f"task {task}: hyper-parameters are chosen on validation rows"
            raise ConfigError(rule, "none", "give data.validation, or leave `tune` out")
        reported: tuple[str, ...] = ("loss", "perplexity")
        if config.train.loss in PAIR_LOSSES:
            reported = reported_of(data, config.train.loss)
        elif data.task is not None:
            if data.task not in self._reported:
                self._reported[data.task] = load_task(data.task).reported
            reported = self._reported[data.task]
        if chooses and metric is not None and metric not in reported:
            rule = f"task {task}: `tune.metric` must be one of {', '.join(reported)}"
            raise ConfigError(rule, repr(metric))

    def _check_sequence(self, task: str, config: CellConfig) -> None:
        """Refuse a metric that a sequence has no score of: its stages share one, or the loss."""
        tasks = [part.data.task for part in config.parts]
        found = {"loss" if name is None else load_task(name).metric for name in tasks}
        own = found.pop() if len(found) == 1 else "loss"
        if self.experiment.tune.metric not in (None, own):
            rule = f"task {task}: a sequence is scored by {own} alone"
            got = f"`tune.metric: {self.experiment.tune.metric}`"
            raise ConfigError(rule, got, f"give {own}, or leave it out")


def _need_shared_split(task: str, config: CellConfig) -> None:
    """Refuse a sequence of which no split has rows of all stages."""
    data = [stage.data for _, stage in config.stages if stage.data.train is not None]
    if not all(each.test for each in data) and not all(each.validation for each in data):
        rule = f"task {task}: stages of a sequence are scored on the same split"
        got = "some with data.test alone, others with data.validation alone"
        raise ConfigError(rule, got, "give all of them one of these")


def _points(experiment: Experiment, method: str) -> list[Point]:
    grid = {
        key: values
        for key, values in experiment.grid(method).items()
        if _trains(experiment, method) or key.split(".")[0] not in _OF_TRAINING
    }
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _unique(cells: Iterable[Cell]) -> list[Cell]:
    return list({(cell.task, cell.method, cell.seed, cell.id): cell for cell in cells}.values())


def _trains(experiment: Experiment, method: str) -> bool:
    tree = merge_trees(experiment.base, experiment.method_tree(method))
    recipe = tree.get("recipe")
    return tree.get("way") != "base" and (recipe is None or recipe.get("links", 1) != 0)


def _config(experiment: Experiment, task: str, method: str, seed: int, point: Point) -> CellConfig:
    own = experiment.tasks[task]
    named = own.get("data") or {}
    data = {} if "task" in named or "train" in named else {"data": {"task": task}}
    shared, given = merge_trees(experiment.base, own), experiment.method_tree(method)
    for key, value in [*point, *((key, seed) for key in experiment.seed_keys)]:
        for part in reversed(key.split(".")):
            value = {part: value}
        given = merge_trees(given, value)
    try:
        if "stages" in shared or "way" in given:
            return _sequence(shared, given, method)
        return CellConfig(**apply_recipe(merge_trees(experiment.base, data, own, given)))
    except ConfigError as error:
        raise ConfigError(f"task {task}, method {method}: {error}") from None


def _sequence(shared: Mapping[str, Any], given: Mapping[str, Any], method: str) -> CellConfig:
    """Return the config of a sequence, whose stages all get the keys of the method."""
    if "stages" not in shared:
        rule = f"{method} is a way to add data sets, and needs a config with stages"
        raise ConfigError(rule, "none", f"add some, or name one of {', '.join(list_methods())}")
    if "way" not in given:
        rule = f"a config with stages is learned in a way to add data sets, and {method} is none"
        raise ConfigError(rule, method, f"name some of {', '.join(list_ways())}")
    keys = {key: value for key, value in given.items() if key not in ("way", "settings")}
    stages = list[tuple[str, RunConfig]]()
    for stage in make_stages({**shared, "output": "-"}):
        own = stage.config.model_dump(mode="json", exclude_defaults=True, exclude={"output"})
        whole = merge_trees(own, keys)
        general = whole.get("start_data") or {"train": "what the model writes"}
        if not stages and "train" not in general:
            whole["data"].pop("replay", None)  # there is nothing to replay yet
        stages.append((stage.name, make_config(whole)))
    first = stages[0][1].model_dump(mode="json", exclude_defaults=True)
    ways = {key: given[key] for key in ("way", "settings") if key in given}
    return CellConfig(**first, **ways, stages=stages)


# --- names of cells ---


def config_id(config: RunConfig) -> str:
    """Return twelve hex digits that name what a config computes.

    Hashed are its values other than the defaults, so that a new key with a default renames no cell;
    a default that has changed counts as the former one. Places and watchers are left out. A file
    named by the config (rows, a task of the user's own, a plug-in) counts by its content. Of a
    task of the paper only the name counts.
    """
    tree = compact_config(config)
    for each in (tree, *(stage for _, stage in tree.get("stages", ()))):
        _with_former_defaults(each)
        _by_content(each)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _with_former_defaults(tree: dict[str, Any]) -> None:
    """Name what a default was not when cells were committed, and leave out what it was."""
    chain = tree.get("chain", {})
    if chain.get("ranks") == FORMER_RANKS:
        del chain["ranks"]
    elif "ranks" not in chain:
        tree["chain"] = {"ranks": [8], **chain}


def _by_content(tree: dict[str, Any]) -> None:
    """Replace files by digests of their content, and leave out what only watches."""
    start = tree.get("start_data")
    general: dict[str, Any] = start if isinstance(start, dict) else {}
    keys = ("task", "train", "validation", "test")
    for section, key in itertools.product((tree["data"], general), keys):
        if isinstance(value := section.get(key), list):
            section[key] = [_content_at(each, key) for each in value]
        elif isinstance(value, str):
            section[key] = _content_at(value, key)
    if "plugins" in tree:
        tree["plugins"] = [plugin_digest(name)[:16] or name for name in tree["plugins"]]
    for key in ("save_every", "log_every", "trackers"):
        tree.get("train", {}).pop(key, None)


def _content_at(source: Any, split: str) -> Any:
    """Return a digest of a file, or of a split in a folder; a Hub dataset stays a name."""
    if isinstance(source, dict):  # a file and its weight
        return source | {"path": _content_at(source["path"], split)}
    path = Path(source)
    file = find_file(path, [split]) if path.is_dir() else path
    return source if file is None or not file.is_file() else _content(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _content(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def compact_config(config: RunConfig) -> dict[str, Any]:
    """Return the config's values other than the defaults, without the places of this machine."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for each in (tree, *(stage for _, stage in tree.get("stages", ()))):
        each.pop("output", None)
        each["data"].pop("dir", None)
    return tree
