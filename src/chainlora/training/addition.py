"""The plan of `chainlora.add`: an adapter from elsewhere, beside the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.reading import make_config
from chainlora.config.schema import RunConfig, with_flat_model
from chainlora.config.staging import RUN_WIDE, Stage, check_name, name_of_rows, section_of
from chainlora.data.splits import check_files, length_limit
from chainlora.errors import ConfigError, RunError
from chainlora.models.finding import is_same_place
from chainlora.runs.adding import (
    ADAPTER,
    adapter_digests,
    check_adapter,
    import_entry,
    read_adapter,
)
from chainlora.runs.addresses import state_at
from chainlora.runs.changes import whole_run
from chainlora.runs.declaring import declared_config, history_of_start
from chainlora.runs.history import BASE, Base
from chainlora.runs.history_file import read_history
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart, split_address
from chainlora.runs.resuming import compare, refuse_if_other
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.placement import Declaring, StagePlan, can_stand
from chainlora.training.plan import Plan, plan_of

_OF_TRAINING = ("replay", "rehearse", "new_rows_only", "keep_rows")  # keys of `data`


def addition(
    run: str | Path, adapter: str | Path, name: str | None, keys: Mapping[str, Any]
) -> Plan:
    """Return the plan of an adapter as an entry `name` of a run, or of a new run.

    `keys` are those of its rows (`data`), and those that a run has one of: model, quantize and
    `RUN_WIDE`. All that can be refused without weights is refused here.

    Raises:
        ConfigError: keys that are not read, or no rows.
        RunError: no adapter, a name that is taken, a run that does not begin on its base.
        ModelError: an adapter for another base.
    """
    folder, there = _place(run)
    given = _checked(keys)
    train = given["data"].get("train")
    name = check_name(name or (name_of_rows(train) if isinstance(train, str) else None))
    begun = None if there is None else _begun(there, name)
    source = str(adapter)
    found = read_adapter(source) if begun is None else NOTHING
    config = _config(folder, there, name, source, found, given)
    if begun is not None:
        _need_same(begun, config, source)
    history = None if there is None else there.history
    stage = Stage(name, config, after=BASE if history is None else history.origin, beside=True)
    planned = StagePlan(stage, begun)
    if begun is None:
        _check(stage, found, there, OpenBase.of_config(config, folder if there else None))
    if history is None:
        # without `start`: the run begins on the base
        own = config.model_copy(update={"start": None})
        history = history_of_start(NOTHING, Base(model=config.model, fingerprint=""), own, name)
    if begun is None:
        planned = replace(planned, declared=import_entry(name, config, history.origin))
    declaring = Declaring(history, folder)
    declaring.add_all([planned])
    start = Start(tokenizer=found.tokenizer) if there is None else NOTHING
    return replace(plan_of(declaring), stages=(planned,), start=start)


def _place(run: str | Path) -> tuple[Path, OpenState | None]:
    """Return where a run is, and what it is now, None where there is none."""
    folder, _ = split_address(run)
    if not exists_in(folder):
        need_apart(folder)
        refuse_if_other(folder)
        files.check_writable(folder)
        return folder, None
    history = read_history(whole_run(run))
    there = state_at(folder, history)
    if not there.has_run and history.entries:
        rule, remedy = "an adapter is added to a run", "begin a run in another folder"
        raise RunError(rule, f"a saved chain, {folder}", remedy)
    if not history.own and any(entry.kind == "stage" for entry in history.unbuilt):
        rule = "an adapter is added to a run whose first stage has ended"
        raise RunError(rule, folder, "finish it by the command that began it")
    origin = history.find_unbuilt(history.origin)
    if history.state_of(history.origin).terms or (origin and origin.config.get("start")):
        rule = "an adapter is added to a run that began on the base itself"
        remedy = "begin another run with it: chainlora add NEW_RUN ADAPTER"
        raise RunError(rule, f"{folder}, which began on other links", remedy)
    return folder, there


def _checked(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys with a section `data`. Raises ConfigError for those that nothing here reads."""
    tree = with_flat_model(keys)
    data = tree["data"] = section_of(tree, "data")
    known = {"model": None, "quantize": None, "data": None, **RUN_WIDE}
    wrong = [key for key in tree if key not in known]
    wrong += [f"data.{key}" for key in _OF_TRAINING if key in data]
    for part in ("chain", "train"):
        tree[part] = section_of(tree, part)
        wrong += [f"{part}.{key}" for key in tree[part] if key not in RUN_WIDE[part]]
    if wrong:
        rule, remedy = "an adapter is added as it was trained", "leave it out"
        raise ConfigError(rule, f"`{wrong[0]}`", remedy)
    if isinstance(data.get("train"), Path):
        data["train"] = str(data["train"])
    if not (data.get("train") or data.get("task")):
        remedy = "give some of what the adapter was trained on, --rows FILE"
        raise ConfigError("a combination reads rows", "none", remedy)
    return tree


def _begun(there: OpenState, name: str) -> OpenState | None:
    """Return the entry of a name, None where it is not built. Raises RunError for a stage."""
    known = there.history.known(name)
    if known is not None and not (known.kind == "import" and known.has_config):
        rule = "an adapter must have a name of its own"
        raise RunError(rule, f"{name!r}, which {there.run} has", "choose another, --name NAME")
    return None if there.history.find(name) is None else there.at(name)


def _is_changed(begun: OpenState, adapter: str) -> bool:
    """Say whether an adapter is another one than an entry was imported from; one that is gone since
    is the same where its name is."""
    assert begun.entry is not None
    try:
        now = adapter_digests(adapter)
    except RunError:
        return adapter != begun.config().start
    return now != begun.entry.training.sources.get(ADAPTER)


def _need_same(begun: OpenState, config: RunConfig, adapter: str) -> None:
    if _is_changed(begun, adapter):
        rule = "an entry keeps the adapter that it was imported from"
        raise RunError(rule, f"another one for {begun.key}", "choose another name, --name NAME")
    compare(begun, config, (), begun.key)


def _config(
    run: Path,
    there: OpenState | None,
    name: str,
    adapter: str,
    found: Start,
    given: Mapping[str, Any],
) -> RunConfig:
    """Return the config of an adapter: its rows, and what its run has one of."""
    tree = dict(given)
    if there is not None:
        tree = _of_run(_first(there, name), given, run)
    elif tree.get("model") is None:
        named = found.adapter.base if found.adapter is not None else ""
        if not named:
            rule = "a new run needs a model"
            raise ConfigError(rule, f"none, and none that {adapter} names", "add --model NAME")
        tree["model"] = named
    tree["chain"] = tree["chain"] | {"ranks": []}  # nothing is trained
    return make_config(tree | {"start": adapter, "output": str(run)})


def _first(there: OpenState, name: str) -> RunConfig:
    """Return the config that says what a run has one of."""
    declared = there.history.find_unbuilt(name)
    if declared is not None and not there.history.own:
        return declared_config(there.run, declared)
    return there.at(BASE).config()


def _of_run(before: RunConfig, given: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return keys with what the run has one of. Raises ConfigError where they say otherwise."""
    tree: dict[str, Any] = {"model": before.model, "quantize": before.quantize}
    model = given.get("model")
    if model not in (None, before.model) and not is_same_place(before.model, str(model), run):
        raise _other("model", model, before.model)
    if given.get("quantize") not in (None, before.quantize):
        raise _other("quantize", given["quantize"], before.quantize)
    for part, keys in RUN_WIDE.items():
        shared = {key: getattr(getattr(before, part), key) for key in keys}
        if differing := [k for k in keys if k in given[part] and given[part][k] != shared[k]]:
            key = differing[0]
            raise _other(f"{part}.{key}", given[part][key], shared[key])
        tree[part] = {**given[part], **shared}
    limits = {key: getattr(before.data, key) for key in ("max_length", "truncation")}
    tree["data"] = limits | tree["data"]
    return tree


def _other(key: str, given: object, before: object) -> ConfigError:
    rule = f"`{key}` must be that of the run"
    return ConfigError(rule, f"{given!r:.60}, and {before!r:.60} there", "leave it out")


def _check(stage: Stage, found: Start, there: OpenState | None, base: OpenBase) -> None:
    """Refuse an adapter that cannot be combined with the run, is for another base, or has no rows
    that can be read."""
    can_stand(stage, (), None, Start(links=found.links))
    if there is not None:
        can_stand(stage, (), there)
    check_adapter(found, base)
    length_limit(stage.config.data, base.context)
    check_files(stage.config.data, None)
