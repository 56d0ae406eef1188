"""Turn the section of a new stage into a stage of a run or of a fork.

A new stage inherits the keys that it leaves open from a stage before it. If it was begun already
(the same command again), it inherits from itself and stays where it was begun.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.config.reading import read_tree, set_key
from chainlora.config.schema import RunConfig
from chainlora.config.staging import (
    Stage,
    check_name,
    make_stage,
    name_of_rows,
    not_inherited,
    section_of,
    standing,
    what_stages_share,
)
from chainlora.data.readers import is_rows
from chainlora.data.splits import has_columns
from chainlora.errors import ConfigError, RunError
from chainlora.models.finding import from_above
from chainlora.runs.addresses import begun_stage, open_run
from chainlora.runs.entries import BASE
from chainlora.runs.loading_start import first_stage
from chainlora.runs.paths import split_address
from chainlora.runs.resuming import not_named
from chainlora.runs.saved_chain import as_adapter
from chainlora.runs.state import OpenState
from chainlora.training.refusing import need_beside, stands_beside

logger = logging.getLogger(__name__)


def extension(
    address: str | Path,
    section: Mapping[str, Any] | str | Path,
    overrides: Sequence[tuple[str, Any]] = (),
    *,
    beside: bool | None = False,
) -> list[Stage]:
    """Return one more stage of a run, or the first stage of a fork, in a list for `train_stages`.

    `address`, `section` and `beside` are those of `extend`; `overrides` replace keys of `section`.
    """
    run, named = split_address(address)
    head, on = open_run(run), open_run(address)
    if not head.has_run:
        got, remedy = f"a saved chain, {run}", as_adapter(run)
        raise RunError("a stage is added to a run", got, remedy)
    keys = _section(section, overrides, run)
    start_data, output = keys.pop("start_data", None), keys.pop("output", None)
    given = keys.pop("beside", None)
    if beside is not None or (given is None and (named or output) is not None):
        given = beside or False
    beside = standing(given, 1)
    name = keys["name"] = check_name(keys.get("name"))
    if beside and (output is not None or on.state != head.state):
        rule, remedy = "a stage beside others begins where RUN began", "leave one out"
        raise RunError(rule, f"--beside with {output or address}", remedy)
    if output is not None:
        fork = {"start_data": start_data, "output": str(output)}
        begun = begun_stage(Path(expanduser(fork["output"])), name)
        _need_state(begun, on, name)
        return [_on_top(on, keys, address, fork, is_new=begun is None)]
    required = head.at(BASE) if beside else on if named is not None else None
    begun = _begun(head, name, required)
    if beside is False and named is None:
        _need_on_top(begun, name)
    can_choose = named is None and (begun is None or begun.parent.key == BASE)
    if beside or (beside is None and can_choose):
        stage = _beside(head, begun, keys, address, beside)
        if stage is not None:
            return [stage]
    parent = on if begun is None else begun.parent
    return [_on_top(parent, keys, address, is_new=begun is None)]


def _need_on_top(begun: OpenState | None, name: str) -> None:
    """Raise RunError for a begun stage that is combined with others."""
    stage = None if begun is None else begun.history.plan().find(name)
    if begun is None or stage is None or stage.names:
        return
    if begun.history.plan().names[0] != name:
        rule = f"stage {name!r} must stay where it was begun"
        raise RunError(rule, "it began beside the others", "choose another name by --name")


def _section(
    section: Mapping[str, Any] | str | Path, overrides: Sequence[tuple[str, Any]], run: Path
) -> dict[str, Any]:
    """Return the keys of a new stage; a file of rows also gives its name."""
    if isinstance(section, Mapping):
        keys = dict(section)
    elif is_rows(section):
        if given := [value for key, value in overrides if key == "data.train"]:
            rule = "a stage's rows are given once"
            raise ConfigError(rule, f"{section} and --data.train {given[0]}", "leave one out")
        keys = {"data": {"train": str(section)}}
    else:
        keys = read_tree(section)
    for key, value in overrides:
        set_key(keys, key, value)
    rows = section_of(keys, "data").get("train")
    if keys.get("name") is None and isinstance(rows, str | Path):
        keys["name"] = name_of_rows(rows)
    if keys.get("start_data") is not None and keys.get("output") is None:
        rule = "`start_data` is read when a run begins"
        matrix = f"chainlora eval {shlex.quote(str(run))} --matrix"
        remedy = f"leave it out, or call {matrix} --start-rows FILE"
        raise RunError(rule, f"some for {run}", f"{remedy}; --output begins a run")
    return keys


def _beside(
    head: OpenState,
    begun: OpenState | None,
    keys: Mapping[str, Any],
    address: str | Path,
    beside: bool | None,
) -> Stage | None:
    """Return a stage beside the others, None if it stands on top of them."""
    # Inherit from the run's first stage: a later one may be pruned, or may not exist when the
    # command is repeated.
    last = begun or first_stage(head.run) or head.at(BASE).with_rows
    stage = replace(_inheriting(last, keys, address), after=BASE, beside=beside)
    if begun is None:
        if not stands_beside(stage):
            return None
        need_beside(stage, (), head)
        _tell_inherited(last, keys, stage)
    return replace(stage, beside=True)


def _on_top(
    parent: OpenState,
    keys: Mapping[str, Any],
    address: str | Path,
    fork: dict[str, Any] | None = None,
    *,
    is_new: bool,
) -> Stage:
    """Return a stage on top of `parent`; `fork`: keys of a new run, which it is the first of."""
    last = parent.with_rows
    stage = _inheriting(last, keys, address, fork)
    if is_new:
        _tell_inherited(last, keys, stage)
    return replace(stage, after=None if fork else parent.key, beside=False)


def _inheriting(
    last: OpenState,
    keys: Mapping[str, Any],
    address: str | Path,
    fork: dict[str, Any] | None = None,
) -> Stage:
    """Return a stage that inherits open keys from the stage `last`; `fork`: keys of a new run."""
    before, section = last.config(), dict(keys)
    plugins = section.pop("plugins", None)
    if plugins is None and before.plugins:
        raise RunError(not_named(f"extend {address}", before.plugins) + ", or --plugins [] without")
    shared = what_stages_share(before) | {"plugins": plugins or (), "output": str(last.run)}
    if fork is not None:
        shared |= {"model": from_above(shared["model"], last.run)} | fork
    place = 1 if fork is None else 0
    read = shared | {"data": shared["data"] | _keys_of_rows(before, section)}
    stage = make_stage(read, section, place)
    if not has_columns(stage.config.data, stage.config.train.loss):
        stage = make_stage(shared, section, place)
    return stage if fork is None else replace(stage, fork=str(address))


def _keys_of_rows(before: RunConfig, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys by which a stage read its rows, unless a new section sets one of them."""
    own = section_of(section, "data")
    if any(key in own for key in ("fields", "format", "task")):
        return {}
    keys = {"fields": dict(before.data.fields), "format": before.data.format}
    default = {"fields": {}, "format": "auto"}
    return {key: value for key, value in keys.items() if value != default[key]}


def _tell_inherited(last: OpenState, keys: Mapping[str, Any], stage: Stage) -> None:
    """Log how rows are read as in the stage before, and its keys that are neither taken nor set."""
    before, data = last.config(), section_of(keys, "data")
    new = stage.config.data
    rows = _keys_of_rows(before, keys)
    if rows and all(getattr(new, key) == getattr(before.data, key) for key in rows):
        shown = ", ".join(f"data.{key} {_shown(value)}" for key, value in rows.items())
        logger.warning("stage %s reads its rows as %s: %s", keys["name"], last.key, shown)
        data |= rows
    if left_out := not_inherited(before, {**keys, "data": data}):
        names = (keys["name"], ", ".join(left_out), last.key)
        logger.warning("stage %s does not inherit %s from %s", *names)


def _shown(value: str | Mapping[str, str]) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, str):
        return value
    return f"'{{{', '.join(f'{field}: {column}' for field, column in value.items())}}}'"


def _begun(head: OpenState, name: str, required: OpenState | None) -> OpenState | None:
    """Return the begun stage of a name, None if it is new; it must have begun on `required`."""
    if head.draft is not None or not any(e.has_config for e in head.history.entries):
        rule = "a stage is added to a run whose first stage has ended"
        raise RunError(rule, head.run, "finish that stage: repeat the command that began it")
    begun = begun_stage(head.run, name, head.history)
    if begun is not None and begun.entry is not None and begun.entry.kind != "stage":
        rule = "a stage must have a name of its own"
        raise RunError(rule, f"{name!r}, a {begun.entry.kind} of {head.run}", "choose another")
    _need_state(begun, required, name)
    return begun


def _need_state(begun: OpenState | None, required: OpenState | None, name: str) -> None:
    """Raise RunError if a stage was begun on another state than the required one."""
    if begun is not None and required is not None and begun.parent.state != required.state:
        rule = f"stage {name!r} must resume on the state that it was begun on"
        got, remedy = f"{required}, and {begun.parent}", f"name {begun.parent}, or another stage"
        raise RunError(rule, got, remedy)
