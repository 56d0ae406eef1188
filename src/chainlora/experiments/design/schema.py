"""What an experiment file may say.

name: rte-first
base: {model: …, recipe: {rank: 8, epochs: 5}, data: {…}, chain: {…}, train: {…}}
tasks: {rte: , wsc: {data: {sampling: saner}}}            # data.task is the name unless given
methods: {lora: , four: {preset: chain, recipe: {links: 4}}}
tune: {grid: {train.lr: [1e-3, 5e-4]}, extend: {train.lr: 2}, seeds: [100, 101]}
seeds: [0, 1, 2, 3, 4, 5]
baseline: lora
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chainlora.errors import ConfigError, nearest
from chainlora.experiments.methods import load_method, merge_trees

TREE_KEYS = ("model", "recipe", "data", "chain", "train")
Figure = Literal["scores", "differences", "curves", "chain_length", "rank_step_down"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tuning(_Frozen):
    """How hyper-parameters are chosen: on validation rows only, for each task and method apart."""

    grid: dict[str, tuple[Any, ...]] = {}
    extend: dict[str, int] = Field(
        default={},
        description="key → values added beyond each end of its grid while the best is that end",
    )
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
            if key.split(".")[0] not in TREE_KEYS or "." not in key:
                raise ValueError(f"`tune.grid` names config keys such as train.lr (got {key!r})")
        return grid

    @model_validator(mode="after")
    def _check(self) -> Tuning:
        for key, count in self.extend.items():
            if count < 0:
                raise ValueError(f"`tune.extend` must be 0 or more values (got {count} for {key})")
        if self.seeds is not None and len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"`tune.seeds` must be different seeds (got {list(self.seeds)})")
        return self


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
    primary: tuple[str, str] | None = Field(
        default=None, description="the one comparison that is tested alone, at the full level"
    )
    gap: tuple[str, str] | None = Field(
        default=None,
        description="(floor, ceiling) of the share of the gap; None: what trains nothing, and what "
        "trains every weight, where both are there",
    )
    curve_points: int = Field(
        default=20,
        ge=0,
        description="evaluations on validation rows along a run, beside those at knots; a config "
        "with eval_every, keep_best, early_stop or eval_at_knots: false keeps its own",
    )
    figures: tuple[Figure, ...] = ("scores", "differences", "curves")
    paper: str | None = Field(
        default=None, description="a table of the paper, for benchmarks/paper/report.py: table1 …"
    )

    @field_validator("tasks", "methods", mode="before")
    @classmethod
    def _names(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple):
            return {str(name): {} for name in value}
        if not isinstance(value, Mapping):
            return value
        for name, keys in value.items():
            if not isinstance(keys, Mapping | None):
                raise ValueError(
                    f"`{info.field_name}.{name}` must be a section of keys (got {keys!r:.60}); "
                    "leave it empty, or give some"
                )
        return {str(name): dict(keys or {}) for name, keys in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ from each other (got {list(self.seeds)})")
        for key, name in self._named_methods():
            if name not in self.methods:
                hint = nearest(str(name), self.methods)
                raise ValueError(f"`{key}` must name methods of this file (got {name!r}){hint}")
        if self.primary is not None and self.primary not in self.pairs:
            raise ValueError(
                f"`primary` must be one of the pairs compared (got {list(self.primary)}); "
                "add it to `comparisons`"
            )
        return self

    def _named_methods(self) -> list[tuple[str, str]]:
        named = [("baseline", self.baseline)] if self.baseline else []
        named += [("comparisons", name) for pair in self.comparisons for name in pair]
        for key in ("primary", "gap"):
            named += [(key, name) for name in getattr(self, key) or ()]
        return named

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
        """Return its preset's keys with those given here over them.

        Raises ConfigError for an unknown preset.
        """
        given = dict(self.methods[name])
        given.pop("grid", None)
        preset = load_method(given.pop("preset", name))
        check_keys(f"methods.{name}", given)
        return merge_trees(preset.keys, given)

    def describe_method(self, name: str) -> str:
        """Return what the file says of a method: its preset, and the keys set over it."""
        preset = self.methods[name].get("preset", name)
        given = {k: v for k, v in self.methods[name].items() if k not in ("preset", "grid")}
        source = load_method(preset).source
        line = f"preset `{preset}` ({source})"
        if not given:
            return line
        return f"{line} with {yaml.safe_dump(given, default_flow_style=True, width=1000).strip()}"

    def grid(self, method: str) -> dict[str, tuple[Any, ...]]:
        """Return the grid of a method: its own where it gives one, else the experiment's."""
        own = self.methods[method].get("grid")
        return Tuning(grid=own).grid if own is not None else self.tune.grid


def check_keys(where: str, tree: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is no section of a config, or holds no keys itself."""
    for key, value in tree.items():
        if key not in TREE_KEYS:
            raise ConfigError(f"unknown key `{where}.{key}`{nearest(str(key), TREE_KEYS)}")
        if key != "model" and not isinstance(value, Mapping | None):
            raise ConfigError(
                f"`{where}.{key}` must be a section of keys (got {value!r:.60}); give some"
            )
