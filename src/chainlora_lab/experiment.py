"""What an experiment file may say.

name: rte-first
base: {model: …, recipe: {rank: 8, epochs: 5}, data: {…}, chain: {…}, train: {…}}
tasks: {rte: , wsc: {data: {sampling: saner}}}            # data.task is the name unless given
methods: {lora: , four: {preset: chain, recipe: {links: 4}}}
tune: {grid: {train.lr: [1e-3, 5e-4]}, extend: {train.lr: 2}, seeds: [100, 101]}
seeds: [0, 1, 2, 3, 4, 5]
baseline: lora

With `stages` in `base` or in a task, methods are ways to add data sets (`sequences`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from chainlora.config.reading import read_tree, set_key
from chainlora.errors import ConfigError, nearest
from chainlora.registry import load_plugins
from chainlora_lab.methods import load_method, merge_trees
from chainlora_lab.outputs import Keys, checked

_OF_SEQUENCES = ("stages", "start_data", "way", "settings")
_OF_RUNS = ("model", "quantize", "plugins", "loop", "recipe", "data", "chain", "train")
TREE_KEYS = (*_OF_RUNS, *_OF_SEQUENCES)
_KINDS: dict[str, tuple[Any, str]] = {
    "model": (str, "a name"),
    "quantize": (str, "a name"),
    "loop": (str, "a name"),
    "way": (str, "a name"),
    "stages": (list, "a list of stages"),
    "start_data": ((str, Mapping), "none or a section of keys"),
    "plugins": ((str, list), "a list of files or modules"),
}  # of the keys that are no sections
OVERALL = "all tasks"  # the row of all of them in a report
Figure = Literal["scores", "differences", "curves", "chain_length", "rank_step_down"]


class Tuning(Keys):
    """How hyper-parameters are chosen: on validation rows only, for each task and method apart."""

    grid: dict[str, tuple[Any, ...]] = Field(default={})
    # key → values added beyond each end of its grid while the best is that end
    extend: dict[str, Annotated[int, Field(ge=0)]] = Field(default={})
    seeds: tuple[int, ...] | None = None  # None: the first of the experiment's seeds
    metric: str | None = None  # validation metric that chooses; None: the task's own

    @field_validator("grid")
    @classmethod
    def _grid(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(
                    f"`tune.grid` must give at least one value a key (got none for {key})"
                )
            if key.split(".")[0] not in TREE_KEYS or "." not in key:
                raise ValueError(f"`tune.grid` names config keys such as train.lr (got {key!r})")
        return grid

    @model_validator(mode="after")
    def _check(self) -> Tuning:
        if self.seeds is not None and len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"`tune.seeds` must be different seeds (got {list(self.seeds)})")
        return self


class Experiment(Keys):
    """One experiment: task × method × grid × seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=200)
    description: str = ""
    base: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    # keys a seed sets; with data.data_seed each draws its rows of a task
    seed_keys: tuple[str, ...] = Field(default=("train.seed",), min_length=1)
    tune: Tuning = Tuning()
    baseline: str | None = None  # None: the first method
    comparisons: tuple[tuple[str, str], ...] = ()  # (method, rival), instead of a baseline
    primary: tuple[str, str] | None = None  # the one that is tested alone, at the full level
    # evaluations on validation rows along a run, beside those at knots; a config with eval_every,
    # keep_best, early_stop or eval_at_knots: false keeps its own
    curve_points: int = Field(default=20, ge=0)
    figures: tuple[Figure, ...] = ("scores", "differences", "curves")
    paper: str | None = None  # a table of the paper, for benchmarks/paper/report.py: table1 …

    @field_validator("tasks", "methods", mode="before")
    @classmethod
    def _names(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple):
            value = {str(name): None for name in value}
        if not isinstance(value, Mapping):
            rule = f"`{info.field_name}` must be a list or a section of keys (got {value!r:.60})"
            raise ValueError(f"{rule}; e.g. [{value}]")
        for name, keys in value.items():
            if not isinstance(keys, Mapping | None):
                raise ValueError(
                    f"`{info.field_name}.{name}` must be a section of keys (got {keys!r:.60}); "
                    "leave it empty, or give some"
                )
            if not re.fullmatch(r".{1,200}", str(name)):  # results.jsonl has no others
                rule = f"`{info.field_name}` must have names of one line and 1 to 200 characters"
                raise ValueError(f"{rule} (got {name!r:.60})")
            if name == OVERALL and info.field_name == "tasks":
                rule = "`tasks` must differ from what a report calls them together"
                raise ValueError(f"{rule} (got {name!r}); give that task another name")
        return {str(name): dict(keys or {}) for name, keys in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ from each other (got {list(self.seeds)})")
        named = [("baseline", self.baseline)] if self.baseline else []
        named += [("comparisons", name) for pair in self.comparisons for name in pair]
        for key, name in [*named, *(("primary", name) for name in self.primary or ())]:
            if name not in self.methods:
                hint = nearest(str(name), self.methods)
                raise ValueError(f"`{key}` must name methods of this file (got {name!r}){hint}")
        if self.primary is not None and self.primary not in self.pairs:
            raise ValueError(
                f"`primary` must be one of the pairs compared (got {list(self.primary)}); "
                "add it to `comparisons`"
            )
        return self

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(method, rival) pairs that the report compares."""
        if self.comparisons:
            return self.comparisons
        baseline = self.baseline or next(iter(self.methods))
        return tuple((name, baseline) for name in self.methods if name != baseline)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        return self.tune.seeds or self.seeds[:1]

    def method_tree(self, name: str) -> dict[str, Any]:
        """Return its preset's keys with those given here over them.

        Raises ConfigError for an unknown preset.
        """
        given = dict(self.methods[name])
        given.pop("grid", None)
        preset = load_method(str(given.pop("preset", name)))
        check_keys(f"methods.{name}", given)
        return merge_trees(preset.keys, given)

    def describe_method(self, name: str) -> str:
        """Return a method's preset and where that comes from."""
        preset = load_method(self.methods[name].get("preset", name))
        return f"preset `{preset.name}` ({preset.source})"

    def grid(self, method: str) -> dict[str, tuple[Any, ...]]:
        """Return the grid of a method: its own where it gives one, else the experiment's."""
        own = self.methods[method].get("grid")
        if own is None:
            return self.tune.grid
        return checked(Tuning, {"grid": own}, f"methods.{method}.").grid


def check_keys(where: str, tree: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is no section of a config, or holds no keys itself."""
    for key, value in tree.items():
        if key not in TREE_KEYS:
            raise ConfigError(f"unknown key `{where}.{key}`{nearest(str(key), TREE_KEYS)}")
        kind, what = _KINDS.get(key, (Mapping, "a section of keys"))
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"`{where}.{key}` must be {what}", f"{value!r:.60}", "give one")


# --- reading ---


def load_experiment(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Experiment:
    """Read an experiment file and apply overrides.

    Args:
        path: the YAML file.
        overrides: ``("base.data.dir", "rows")`` pairs, values parsed as YAML. A list of names for
            `tasks` or `methods` keeps the file's entries of these names, and the comparisons among
            them.

    Raises:
        ConfigError: unreadable file, unknown key (nearest named), wrong value.
    """
    tree = read_tree(path, "experiment file")
    if "model" in tree and "base" not in tree:
        raise ConfigError(
            "experiment file must hold base, tasks and methods",
            f"{path}, the config of one run",
            f"chainlora compare {path} --methods lora,chain3 --output DIR",
        )
    file = make_experiment(tree) if overrides else None
    for key, value in overrides:
        set_key(tree, key, value)
    given = {key for key, _ in overrides}
    if file is not None:
        for key, own in (("tasks", file.tasks), ("methods", file.methods)):
            if key in given and isinstance(tree[key], list):
                tree[key] = {str(name): own.get(str(name)) for name in tree[key]}
        if isinstance(tree.get("methods"), dict):
            tree |= _compared(file, list(map(str, tree["methods"])), given)
    return make_experiment(tree)


def _compared(file: Experiment, names: list[str], given: set[str]) -> dict[str, Any]:
    """Return what a file compares among the methods asked for, unless that is given too."""
    kept: dict[str, Any] = {}
    if file.primary and not set(file.primary) <= set(names):
        kept["primary"] = None
    if file.comparisons:
        kept["comparisons"] = [pair for pair in file.comparisons if set(pair) <= set(names)]
        if not kept["comparisons"] and "comparisons" not in given:
            raise ConfigError(
                "`methods` must keep a pair that the file compares",
                ", ".join(names),
                "name a rival too, or give `comparisons`",
            )
    return {key: value for key, value in kept.items() if key not in given}


def make_experiment(tree: Mapping[str, Any]) -> Experiment:
    """Check a nested mapping and return the experiment.

    Raises ConfigError with every problem in one line.
    """
    experiment = checked(Experiment, tree)
    check_keys("base", experiment.base)
    named = merge_trees(experiment.base, *experiment.methods.values()).get("plugins", ())
    load_plugins(named)  # which may add methods
    for name, keys in experiment.tasks.items():
        check_keys(f"tasks.{name}", keys)
    for name in experiment.methods:
        experiment.method_tree(name)
        _check_grid(experiment, name)
    return experiment


def _check_grid(experiment: Experiment, method: str) -> None:
    grid = experiment.grid(method)
    for key in experiment.tune.extend:
        if not any(key in experiment.grid(name) for name in experiment.methods):
            raise ConfigError("`tune.extend` must name keys of `tune.grid`", repr(key))
        values = grid.get(key, ())
        if not all(type(value) in (int, float) and value > 0 for value in values):
            raise ConfigError(
                "`tune.extend` needs positive numbers in the grid",
                f"{list(values)} for {key}",
                f"give them, or leave {key} out of `extend`",
            )
