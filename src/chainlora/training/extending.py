"""Make the config of one more stage of a run, and find the state that it begins on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.config.reading import read_tree, set_key
from chainlora.config.staging import (
    STANDING,
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
from chainlora.errors import RunError
from chainlora.models.finding import from_above
from chainlora.runs.addresses import begun_stage, open_run
from chainlora.runs.paths import split_address
from chainlora.runs.resuming import not_named
from chainlora.runs.state import OpenState
from chainlora.training.placement import can_stand

logger = logging.getLogger(__name__)


def extension(
    address: str | Path,
    section: Mapping[str, Any] | str | Path,
    overrides: Sequence[tuple[str, Any]] = (),
    *,
    beside: bool | None = False,
    rehearse: bool = False,
) -> list[Stage]:
    """Return one more stage of a run, which `section` and `overrides` describe: a mapping, or the
    path of a file of rows or of YAML. One without a name has that of its file of rows.

    `beside` and `rehearse` are those of `extend`. Without `beside` the stage begins on the state
    that `address` names, with `output` in a run of its own. Other keys are inherited from the stage
    before, with `beside` from the run's first; a warning names those that are not.

    Raises:
        ConfigError: a stage without a name, or with keys that a stage cannot have.
        RunError: a stage that was begun on another state, or before the first has ended.
    """
    run, named = split_address(address)
    now, on = open_run(run), open_run(address)
    if not now.has_run:
        raise RunError(
            "a stage is added to a run",
            f"a saved chain, {run}",
            f"begin a run on it, by start: {run} in its config",
        )
    own = _section(section)
    for key, value in overrides:
        set_key(own, key, value)
    rows = section_of(own, "data").get("train")
    if own.get("name") is None and isinstance(rows, str | Path):
        own["name"] = name_of_rows(rows)
    given = own.pop("start_data", None)
    if given is not None and own.get("output") is None:
        rule = "`start_data` is read when a run begins"
        remedy = f"leave it out, or call chainlora eval {run} --matrix --start-rows FILE"
        raise RunError(rule, f"some for {run}", f"{remedy}; --output begins a run")
    keys = standing({key: own.pop(key) for key in STANDING if key in own}, 1)
    beside = keys["beside"] if beside is None else beside
    name, output = check_name(own.get("name")), own.pop("output", None)
    output = output if output is None else str(output)
    if beside and (output is not None or on.state != now.state):
        rule, remedy = "a stage beside others begins where RUN began", "leave one out"
        raise RunError(rule, f"--beside with {output or address}", remedy)
    if output is not None:
        begun, below = begun_stage(Path(expanduser(output)), name), on
    else:
        origin, own_stages = now.at(now.history.origin), now.history.own_stages
        begun = _begun(now, name, origin if beside else on if named is not None else None)
        can_choose = named is None and (begun is None or begun.parent.key == origin.key)
        if beside or (beside is None and can_choose):
            # not from a stage that may be pruned, or not there when the command is given again
            last = begun or (now.at(own_stages[0]) if own_stages else origin.with_rows)
            stage = replace(_after(last, own, address), after=origin.key, beside=beside)
            if begun is not None or can_stand(stage, (), now):
                _tell_left_out(begun, last, own)
                return [replace(stage, beside=True, rehearse=rehearse or keys["rehearse"])]
        below = on if begun is None else begun.parent
    last = below.with_rows
    stage = _after(last, own, address, output, given)
    _tell_left_out(begun, last, own)
    after = None if output is not None else below.key
    return [replace(stage, after=after, beside=False, rehearse=False)]


def _section(given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    return {"data": {"train": str(given)}} if is_rows(given) else read_tree(given)


def _after(
    last: OpenState,
    own: Mapping[str, Any],
    address: str | Path,
    fork: str | None = None,
    start_data: Any = None,
) -> Stage:
    """Return a stage that inherits from another one, in the same run or a fork."""
    before, run = last.config(), last.run
    section = dict(own)
    plugins = section.pop("plugins", None)
    if plugins is None and before.plugins:
        raise RunError(not_named(f"extend {address}", before.plugins) + ", or --plugins [] without")
    shared = what_stages_share(before) | {"plugins": plugins or (), "output": str(run)}
    if fork is None:
        return make_stage(shared, section, 1)
    base = from_above(shared["model"], run)
    shared |= {"model": base, "start": str(address), "start_data": start_data, "output": fork}
    return make_stage(shared, section, 0)


def _tell_left_out(begun: OpenState | None, last: OpenState, own: Mapping[str, Any]) -> None:
    """Warn of keys of the stage before that a new one neither inherits nor sets."""
    if begun is not None or section_of(own, "data").get("rehearse", False):
        return
    if left_out := not_inherited(last.config(), own):
        what = (own["name"], ", ".join(left_out), last.stage)
        logger.warning("stage %s does not inherit %s from %s", *what)


def _begun(now: OpenState, name: str, on: OpenState | None) -> OpenState | None:
    """Return the stage of this name, None where it is new. Raises RunError for something else, and
    for one that was begun on another state than `on`, if that is given."""
    if now.draft is not None or (now.history.unbuilt and not now.history.own):
        rule = "a stage is added to a run whose first stage has ended"
        raise RunError(rule, now.run, "finish it by the command that began it")
    begun = begun_stage(now.run, name, now.history)
    if begun is not None and begun.entry is not None and begun.entry.kind != "stage":
        rule = "a stage must have a name of its own"
        raise RunError(rule, f"{name!r}, a {begun.entry.kind} of {now.run}", "choose another")
    if begun is not None and on is not None and begun.parent.state != on.state:
        rule = f"stage {name!r} must go on from where it was begun"
        raise RunError(rule, f"{on}, and {begun.parent}", "name that, or another stage")
    return begun
