"""The change of `chainlora.add`: an adapter becomes a stage beside the others of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.adapters.adapter_files import MERGE
from chainlora.config.data import StartData
from chainlora.config.reading import make_config
from chainlora.config.schema import RunConfig, with_flat_model
from chainlora.config.staging import RUN_WIDE, Stage, check_name, name_of_rows, section_of
from chainlora.data.splits import check_files, length_limit
from chainlora.errors import ConfigError, RunError
from chainlora.models.finding import is_same_place
from chainlora.runs.adding import check_adapter, read_adapter
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.changes import whole_run
from chainlora.runs.declaring import config_of, first_history, stage_of
from chainlora.runs.entries import Base
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING, Start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart, refuse_if_other, split_address
from chainlora.runs.recipes import Stage as PlannedStage
from chainlora.runs.resuming import ADAPTER, adapter_digests, need_same, need_same_start
from chainlora.runs.state import OpenState
from chainlora.training.reconcile import Change, settled
from chainlora.training.refusing import StagePlan, check_rows, need_beside, need_in_layers

_OF_TRAINING = ("replay", "new_rows_only", "keep_rows")  # keys of `data`


def addition(
    run: str | Path, adapter: str | Path, name: str | None, keys: Mapping[str, Any]
) -> Change:
    """Return the change that adds an adapter as the stage `name` to a run, or to a new run.

    `keys` are keys of the adapter's rows (`data`), and keys that all stages of a run share: model,
    quantize and `RUN_WIDE`. Everything that needs no weights is checked here.
    """
    folder, head = _open(run)
    keys = _checked(keys)
    train = keys["data"].get("train")
    name = check_name(name or (name_of_rows(train) if isinstance(train, str) else None))
    known = None if head is None else _known(head, name)
    source = str(adapter)
    imported = read_adapter(source) if known is None or head is None else NOTHING
    config = _config(folder, head, name, source, imported, keys)
    stage = Stage(name, config, beside=True)
    if known is not None and head is not None:
        _need_same(head, known, config, source)
        planned = StagePlan(stage, begun_stage(folder, name, head.history))
        return Change(folder, head.history, (planned,), {name: config})
    _check(stage, imported, head, OpenBase.of_config(config, folder if head else None))
    if head is not None:
        history, start = head.history, NOTHING
    else:
        # without `start`: the new run begins on the base, not on the adapter
        first = config.model_copy(update={"start": None})
        history = first_history(first, Base(model=config.model, fingerprint=""), NOTHING)
        start = Start(tokenizer=imported.tokenizer)
    plan = history.plan().with_stage(stage_of(name, config, kind="import"))
    history = history.edited(plan, f"add {name}")
    return Change(folder, history, (StagePlan(stage),), {name: config}, start)


def _open(run: str | Path) -> tuple[Path, OpenState | None]:
    """Return the folder of a run and the state at its head, None for a new run."""
    folder, _ = split_address(run)
    if not exists_in(folder):
        need_apart(folder)
        refuse_if_other(folder)
        files.check_writable(folder)
        return folder, None
    history = settled(folder, read_history(whole_run(run)))
    if history.is_blank:
        return folder, None
    head = state_at(folder, history)
    if not head.has_run and history.entries:
        rule, remedy = "an adapter is added to a run", "begin a run in another folder"
        raise RunError(rule, f"a saved chain, {folder}", remedy)
    unfinished = [stage.name for stage in history.plan().stages if stage.kind == "stage"]
    if unfinished and not any(entry.has_config for entry in history.entries):
        rule = "an adapter is added to a run whose first stage has ended"
        raise RunError(rule, folder, "finish that stage: repeat the command that began it")
    return folder, head


def _checked(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the keys with all sections. Raise ConfigError for unknown keys."""
    tree = with_flat_model(keys)
    data = tree["data"] = section_of(tree, "data")
    known = {"model": None, "quantize": None, "data": None, "start_data": None, **RUN_WIDE}
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
    if not data.get("train"):
        remedy = "give some of the adapter's training rows, --rows FILE"
        raise ConfigError("a combination reads rows", "none", remedy)
    return tree


def _known(head: OpenState, name: str) -> PlannedStage | None:
    """Return the added adapter of a name in the plan of a run, None if it is new."""
    known = head.history.plan().find(name)
    is_taken = known.kind != "import" if known is not None else head.history.find(name) is not None
    if is_taken:
        rule = "an adapter must have a name of its own"
        raise RunError(rule, f"{name!r}, which {head.run} has", "choose another, --name NAME")
    return known


def _need_same(head: OpenState, known: PlannedStage, config: RunConfig, adapter: str) -> None:
    """Raise RunError if an entry was added from another adapter, or with other keys."""
    try:
        is_same = adapter_digests(adapter) == known.sources.get(ADAPTER)
    except RunError:  # the adapter is gone
        is_same = adapter == known.config.get("start")
    if not is_same:
        rule = "an entry keeps the adapter that it was imported from"
        raise RunError(rule, f"another one for {known.name}", "choose another name, --name NAME")
    has_ended = head.history.find(known.name) is not None
    need_same(head, known, config, has_ended=has_ended)


def _config(
    run: Path,
    head: OpenState | None,
    name: str,
    adapter: str,
    imported: Start,
    keys: Mapping[str, Any],
) -> RunConfig:
    """Return the config of an adapter: its rows, and the keys that its run shares."""
    tree, begun = dict(keys), None
    if head is not None:
        begun = _begun_config(head, name)
        tree = _with_shared_keys(keys, begun or _first_config(head), run)
        tree["start_data"] = keys.get("start_data")
    elif tree.get("model") is None:
        base = imported.adapter.base if imported.adapter is not None else ""
        if not base:
            rule = "a new run needs a model"
            raise ConfigError(rule, f"none, and {adapter} names none", "add --model NAME")
        tree["model"] = base
    tree["chain"] = tree["chain"] | {"ranks": []}  # nothing is trained
    config = make_config(tree | {"start": adapter, "output": str(run)})
    if head is not None:
        need_same_start(head, config)
    return config


def _begun_config(head: OpenState, name: str) -> RunConfig | None:
    """Return the config of an adapter in the plan, None if it is new."""
    known = head.history.plan().find(name)
    return None if known is None else config_of(head.run, known)


def _first_config(head: OpenState) -> RunConfig:
    """Return the config of a run's first stage, which has the keys that all stages share."""
    return config_of(head.run, head.history.plan().stages[0])


def _with_shared_keys(keys: Mapping[str, Any], first: RunConfig, run: Path) -> dict[str, Any]:
    """Return the keys, completed by the run's shared keys. Raise ConfigError if they contradict."""
    tree: dict[str, Any] = {"model": first.model, "quantize": first.quantize}
    model = keys.get("model")
    if model not in (None, first.model) and not is_same_place(first.model, str(model), run):
        raise _differs("model", model, first.model)
    if keys.get("quantize") not in (None, first.quantize):
        raise _differs("quantize", keys["quantize"], first.quantize)
    for part, names in RUN_WIDE.items():
        shared = {key: getattr(getattr(first, part), key) for key in names}
        if differing := [k for k in names if k in keys[part] and keys[part][k] != shared[k]]:
            key = differing[0]
            raise _differs(f"{part}.{key}", keys[part][key], shared[key])
        tree[part] = {**keys[part], **shared}
    limits = {key: getattr(first.data, key) for key in ("max_length", "truncation")}
    tree["data"] = limits | tree["data"]
    return tree


def _differs(key: str, value: object, of_run: object) -> ConfigError:
    rule = f"`{key}` must equal the value in the run"
    return ConfigError(rule, f"{value!r:.60}, and {of_run!r:.60} there", "leave it out")


def _check(stage: Stage, imported: Start, head: OpenState | None, base: OpenBase) -> None:
    """Raise ChainLoRAError unless the adapter fits the base, can be combined, and has rows."""
    need_beside(stage, (), None, Start(links=imported.links))
    if head is not None:
        need_beside(stage, (), head)
    check_adapter(imported, base)
    if head is not None:
        need_in_layers(base.skeleton, [link.config for link in imported.links], MERGE)
    config = stage.config
    length_limit(config.data, base.context)
    check_files(config.data, None)
    if isinstance(config.start_data, StartData):
        check_files(config.start_data.as_data(config.data), None)
    if head is None:  # the base writes its general rows first
        check_rows(config, base, imported.tokenizer)
