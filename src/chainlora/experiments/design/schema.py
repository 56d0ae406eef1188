"""What an experiment file may say, and how one is read.

name: rte-first                       # names the report base: {model: …, recipe: {rank: 8, epochs:
5}, data: {…}, chain: {…}, train: {…}}   # shared by every cell tasks: {rte: , wsc: {data:
{sampling: saner}}}       # name -> keys; data.task is the name unless given methods: {lora: , four:
{preset: chain, recipe: {links: 4}}}   # name -> preset and keys tune: {grid: {train.lr: [1e-3,
5e-4]}, seeds: [0]}   # chosen on validation, per task and method seeds: [0, 1, 2, 3, 4] baseline:
lora                        # what every other method is compared with
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from chainlora.config.loading import parse_yaml, set_key
from chainlora.config.messages import problems
from chainlora.errors import ConfigError, nearest
from chainlora.experiments.design.paper import check_table
from chainlora.experiments.methods import load_method, merge_trees

_TREE_KEYS = ("model", "recipe", "data", "chain", "train")
Figure = Literal["scores", "differences", "chain_length", "rank_step_down"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tuning(_Frozen):
    """How hyper-parameters are chosen: on validation rows only, for each task and method apart."""

    grid: dict[str, tuple[Any, ...]] = {}
    seeds: tuple[int, ...] | None = Field(
        default=None, description="None: the first of the experiment's seeds"
    )
    metric: str | None = Field(
        default=None, description="validation metric that chooses; None: the task's own"
    )

    @field_validator("grid")
    @classmethod
    def _grid(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(
                    f"`tune.grid` must give at least one value a key (got none for {key})"
                )
            if key.split(".")[0] not in _TREE_KEYS or "." not in key:
                raise ValueError(f"`tune.grid` names config keys such as train.lr (got {key!r})")
        return grid


class Experiment(_Frozen):
    """One experiment: task × method × grid × seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    description: str = ""
    base: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    seed_keys: tuple[str, ...] = Field(
        default=("train.seed",),
        min_length=1,
        description="keys a seed sets; with data.data_seed each draws its rows",
    )
    tune: Tuning = Tuning()
    baseline: str | None = Field(default=None, description="None: the first method")
    comparisons: tuple[tuple[str, str], ...] = Field(
        default=(), description="(method, rival), instead of a baseline"
    )
    figures: tuple[Figure, ...] = ("scores", "differences")
    paper: str | None = Field(
        default=None, description="table of the paper shown beside ours, e.g. table1"
    )

    @field_validator("tasks", "methods", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = dict.fromkeys(value)
        if isinstance(value, Mapping):
            return {str(name): dict(keys or {}) for name, keys in value.items()}
        return value

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ from each other (got {list(self.seeds)})")
        compared = [("baseline", self.baseline)] if self.baseline else []
        for name, rival in self.comparisons:
            compared += [("comparisons", name), ("comparisons", rival)]
        for key, name in compared:
            if name not in self.methods:
                hint = nearest(str(name), self.methods)
                raise ValueError(f"`{key}` must name methods of this file (got {name!r}){hint}")
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
        """Seeds of the runs that choose."""
        return self.tune.seeds or self.seeds[:1]

    def method_tree(self, name: str) -> dict[str, Any]:
        """Return its preset's keys with those given here over them. Raises ConfigError: unknown
        preset."""
        given = dict(self.methods[name])
        given.pop("grid", None)
        preset = load_method(given.pop("preset", name))
        _check_keys(f"methods.{name}", given)
        return merge_trees(preset.keys, given)

    def describe_method(self, name: str) -> str:
        """Return one line on a method: its preset's, and the keys set here."""
        given = {
            key: value for key, value in self.methods[name].items() if key not in ("preset", "grid")
        }
        line = load_method(self.methods[name].get("preset", name)).description
        return (
            f"{line} Here: {yaml.safe_dump(given, default_flow_style=True).strip()}"
            if given
            else line
        )

    def grid(self, method: str) -> dict[str, tuple[Any, ...]]:
        """Return the grid of a method: its own where it gives one, else the experiment's."""
        own = self.methods[method].get("grid")
        return Tuning(grid=own).grid if own is not None else self.tune.grid


def load_experiment(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Experiment:
    """Read an experiment file; `overrides` are ``("base.data.dir", "rows")`` pairs, values parsed
    as YAML.

    A list of names for `tasks` or `methods` keeps the file's entries of these names, and the
    comparisons among them.

    Raises ConfigError: unreadable file, unknown key (nearest named), wrong value.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"experiment file must be readable (got {path}: {error.strerror}); check the path"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"experiment file must be YAML (got {path}: {' '.join(str(error).split())})"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"experiment file must hold a mapping of keys (got {type(tree).__name__} in {path})"
        )
    own = {key: tree.get(key) for key in ("tasks", "methods")}
    for key, value in overrides:
        set_key(tree, key, value)
    for key, before in own.items():
        if isinstance(tree.get(key), list) and isinstance(before, Mapping):
            tree[key] = {name: before.get(name) for name in tree[key]}
    given = {key for key, _ in overrides}
    if "methods" in given and "comparisons" not in given:
        _keep_pairs(tree)
    return make_experiment(tree)


def _keep_pairs(tree: dict[str, Any]) -> None:
    """Leave out the comparisons with methods that are not asked for."""
    names, pairs = list(tree["methods"] or ()), tree.get("comparisons")
    if not isinstance(pairs, list) or not pairs:
        return
    kept = [pair for pair in pairs if not isinstance(pair, list) or set(pair) <= set(names)]
    if not kept:
        raise ConfigError(
            f"`methods` must keep a pair that the file compares (got {names}); name a rival too, "
            "or "
            "give `comparisons`"
        )
    tree["comparisons"] = kept


def make_experiment(tree: Mapping[str, Any]) -> Experiment:
    """Check a nested mapping and return the experiment. Raises ConfigError with every problem in
    one line."""
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems(error, Experiment)) from None
    if experiment.paper is not None:
        check_table(experiment.paper)
    _check_keys("base", experiment.base)
    for name, keys in experiment.tasks.items():
        _check_keys(f"tasks.{name}", keys)
    for name in experiment.methods:
        experiment.method_tree(name)
        try:
            experiment.grid(name)
        except ValidationError as error:
            raise ConfigError(problems(error, Tuning, f"methods.{name}.")) from None
    return experiment


def _check_keys(where: str, tree: Mapping[str, Any]) -> None:
    for key in tree:
        if key not in _TREE_KEYS:
            raise ConfigError(f"unknown key `{where}.{key}`{nearest(key, _TREE_KEYS)}")
