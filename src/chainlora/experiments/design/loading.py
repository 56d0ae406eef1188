"""From an experiment file, overrides or a mapping to a checked `Experiment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chainlora.config.loading import read_tree, set_key
from chainlora.config.messages import problems
from chainlora.errors import ConfigError
from chainlora.experiments.design.schema import Experiment, Tuning, check_keys


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
    own = {key: tree.get(key) for key in ("tasks", "methods")}
    for key, value in overrides:
        set_key(tree, key, value)
    for key, before in own.items():
        names = tree.get(key)
        if isinstance(before, Mapping) and isinstance(names, list) and _are_names(names):
            tree[key] = {name: before.get(name) for name in names}
    given = {key for key, _ in overrides}
    if "methods" in given and _are_names(tree["methods"]):
        _keep_what_is_left(tree, given)
    return make_experiment(tree)


def _are_names(values: Any) -> bool:
    """Say whether these are names, and not something that is refused later."""
    return isinstance(values, list | dict) and all(isinstance(each, str | int) for each in values)


def _keep_what_is_left(tree: dict[str, Any], given: set[str]) -> None:
    """Leave out comparisons, primary one and gap that name methods not asked for."""
    names, pairs = set(tree["methods"] or ()), tree.get("comparisons")
    for key in ("primary", "gap"):
        if key not in given and _are_names(tree.get(key)) and not set(tree[key]) <= names:
            del tree[key]
    if "comparisons" in given or not isinstance(pairs, list) or not pairs:
        return
    kept = [pair for pair in pairs if not _are_names(pair) or set(pair) <= names]
    if not kept:
        raise ConfigError(
            "`methods` must keep a pair that the file compares "
            f"(got {list(tree['methods'] or ())}); name a rival too, or give `comparisons`"
        )
    tree["comparisons"] = kept


def make_experiment(tree: Mapping[str, Any]) -> Experiment:
    """Check a nested mapping and return the experiment.

    Raises ConfigError with every problem in one line.
    """
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems(error, Experiment)) from None
    check_keys("base", experiment.base)
    for name, keys in experiment.tasks.items():
        check_keys(f"tasks.{name}", keys)
    for name in experiment.methods:
        experiment.method_tree(name)
        _check_grid(experiment, name)
    return experiment


def _check_grid(experiment: Experiment, method: str) -> None:
    try:
        grid = experiment.grid(method)
    except ValidationError as error:
        raise ConfigError(problems(error, Tuning, f"methods.{method}.")) from None
    for key in experiment.tune.extend:
        if key in grid:
            _check_extendable(key, grid[key])
        elif not any(key in experiment.grid(name) for name in experiment.methods):
            raise ConfigError(f"`tune.extend` must name keys of `tune.grid` (got {key!r})")


def _check_extendable(key: str, values: Sequence[Any]) -> None:
    numbers = [
        v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0
    ]
    if len(numbers) < len(values):
        raise ConfigError(
            f"`tune.extend` needs positive numbers in the grid (got {list(values)} for {key}); "
            f"give them, or leave {key} out of `extend`"
        )
