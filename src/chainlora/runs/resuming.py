"""Whether a folder can become a run's, and whether a stage is the one that a config describes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any

from chainlora import files
from chainlora.config.schema import DataConfig, RunConfig, StartData
from chainlora.config.staging import OF_START
from chainlora.config.yaml_text import one_value
from chainlora.data.splits import named_sources, source_digest
from chainlora.errors import RunError
from chainlora.models.finding import from_above, is_same_place, resolve_model
from chainlora.models.identity import base_files
from chainlora.registry import plugin_digest
from chainlora.runs.costs import versions
from chainlora.runs.history import CONFIG, START, Change, Entry, Training
from chainlora.runs.opening import check_base
from chainlora.runs.paths import exists_in
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

# Keys that a resume may change by name: they decide steps to come, and nothing that is on disk.
CHANGEABLE = ("train.lr", "train.max_grad_norm")
# Keys that say where something lies. A resume reads it, and checks that it is the same.
_PLACES = ("model", "data.train", "data.validation", "data.test")


def refuse_if_taken(run: Path) -> None:
    """Raise RunError where something else than an empty directory is."""
    if not run.is_dir():
        return
    with files.reported(run, "read"):
        if not any(run.iterdir()):
            return
    what, remedy = (
        ("holds a run", "pass resume=True to resume it, or ")
        if exists_in(run)
        else ("is not empty and not a whole run", "")
    )
    raise RunError(
        f"`output` must be a new or empty directory (got {run}, which {what}); "
        f"{remedy}choose another output"
    )


def refuse_if_other(run: Path) -> None:
    """Raise RunError where something is that is neither a run nor the place for a new one."""
    if not exists_in(run):
        refuse_if_taken(run)


def compare(
    begun: OpenState, now: RunConfig, change: Collection[str] = (), stage: str | None = None
) -> list[Change]:
    """Return the keys that a resume changes: of `change`, or places. None where a stage has ended.

    Where something lies is no part of what a stage is: what lies there is. Of one that resumes,
    base and rows are compared later. One that has ended is compared here: what lies in another
    place than before, and a base in a folder. Its files of rows may grow or be gone. `stage` is its
    name in messages, where the run has several.

    Raises RunError for another config, or other content.
    """
    before, entry = begun.config(), _entry(begun)
    need_start(before, now)
    _compare_start_rows(begun, before, now)
    old, new = _science(before), _science(now)
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    allowed = {key for key in differing if _is_same_content(key, begun, before, now)}
    if begun.draft is None:
        was = [(each.key, each.before) for each in entry.training.changes]  # before it was resumed
        allowed |= {key for key in differing if (key, new[key]) in was}
    else:
        allowed |= set(change).intersection(CHANGEABLE)
        if entry.training.rows is not None:
            places = set(_PLACES).intersection(differing)
            allowed |= {k for k in places if _without_place(old[k]) == _without_place(new[k])}
    for key in differing:
        if key not in allowed:
            raise _other_config(begun, key, old[key], new[key], stage)
    if begun.draft is None:
        _check_model(begun, before.model, now.model)
        return []
    step = begun.draft.position.step
    return [Change(key=key, before=old[key], after=new[key], step=step) for key in differing]


def need_start(before: RunConfig, now: RunConfig) -> None:
    """Raise RunError where a config leaves out the `start` that its run began on."""
    if before.start is not None and now.start is None:
        rule = "`start` must be what the run began on"
        got = f"none, and {before.start} for {now.output}"
        raise RunError(rule, got, f"add start: {before.start}, or choose another output")


def _entry(begun: OpenState) -> Entry:
    assert begun.entry is not None
    return begun.entry


def _compare_start_rows(begun: OpenState, before: RunConfig, now: RunConfig) -> None:
    """Raise RunError for other rows of the start than those that the run keeps."""
    if now.start_data in (None, before.start_data):
        return
    if now.start_data == "none" and START in begun.keepers:
        raise _other_rows(begun, "none")
    was, rows = (
        (each if isinstance(each, StartData) else StartData.model_construct()).model_dump()
        for each in (before.start_data, now.start_data)
    )
    known, own = _entry(begun).training.sources, start_digests(now)
    changed = {key: rows[key] for key in rows if rows[key] != was[key]}
    for key in changed:
        digest = known.get(f"start_{key}")
        if digest is None or digest != own.get(f"start_{key}"):
            raise _other_rows(begun, f"another start_data.{key}, {rows[key]!r:.60},")


def _other_rows(begun: OpenState, got: str) -> RunError:
    remedy = f"leave it as it was, or replace the rows: chainlora eval {begun.run} --matrix"
    rule = "`start_data` is read when a run begins"
    return RunError(rule, f"{got} for {begun.run}", f"{remedy} --start-rows FILE")


def source_digests(config: RunConfig) -> dict[str, list[str]]:
    """Return what names the content of a config's task and files of rows, by their keys."""
    return _digests(config.data) | start_digests(config)


def start_digests(config: RunConfig) -> dict[str, list[str]]:
    """Return what names the content of each source of `start_data`, by ``start_KEY``."""
    if not isinstance(config.start_data, StartData):
        return {}
    found = _digests(config.start_data.as_data(config.data))
    return {key.replace("data.", "start_", 1): digests for key, digests in found.items()}


def _digests(data: DataConfig) -> dict[str, list[str]]:
    return {
        key: [source_digest(key, each.path, data) for each in named]
        for key, named in named_sources(data).items()
        if all(each.path for each in named)  # those for a start need not have `train`
    }


def _other_config(begun: OpenState, key: str, old: Any, new: Any, stage: str | None) -> RunError:
    run, has_ended = begun.run, begun.draft is None
    differs = f"{key} is {one_value(new):.60}, was {one_value(old):.60}"
    if key in _entry(begun).training.sources and has_ended:
        differs += ", compared by content"
    if stage is not None:
        rule, got = "a stage keeps the config it began with", f"stage {stage!r}: {differs}"
        remedy = "give what you want to train now a new name (--name)"
    elif has_ended:
        rule, got = "a run that has ended keeps its config", f"{differs} in {run}"
        remedy = f"choose another output, or add a stage to it: chainlora extend {run} FILE"
    else:
        rule, got = "a run resumes with the config it began with", f"{differs} in {run}"
        remedy = f"use {begun.folder / CONFIG}, or choose another output"
    if key in CHANGEABLE and not has_ended:
        remedy = f"to resume with another value, pass --{key} VALUE; else {remedy}"
    return RunError(rule, got, remedy)


def _is_same_content(key: str, begun: OpenState, before: RunConfig, now: RunConfig) -> bool:
    """Say whether a key names what it named when the run began, by another name or elsewhere."""
    if key == "model":
        return begun.draft is None  # compared by `_check_model`
    old, new = (named_sources(config.data).get(key, []) for config in (before, now))
    digests = _entry(begun).training.sources.get(key)
    known: Sequence[str | None] = digests or [None] * len(old)
    return (
        bool(old)
        and len(old) == len(new) == len(known)
        and all(
            was.weight == each.weight
            and (
                is_same_place(was.path, each.path, begun.run)
                or source_digest(key, each.path, now.data) == digest
            )
            for was, each, digest in zip(old, new, known, strict=True)
        )
    )


def _check_model(begun: OpenState, before: str, now: str) -> None:
    """Raise RunError for another base. One that is where it was is read only in a folder."""
    place = from_above(now, begun.run)
    if now != before or Path(place).is_dir():
        check_base(begun.base, begun.run, files=base_files(resolve_model(place)))


def _without_place(value: Any) -> Any:
    """Return what is left of a model or a source of rows when it may lie anywhere.

    Of several files the digest of the rows does not tell which row is of which: their names do.
    """
    if isinstance(value, list | tuple):
        return [(PurePath(each["path"]).name, each["weight"]) for each in value]
    return str if isinstance(value, str) else value


def check_resumed(before: Training, rows: str) -> None:
    """Raise RunError unless the rows are those that the stage began with. Warn where it goes on
    under other versions: the same steps, but other roundings."""
    if before.rows is not None and before.rows != rows:
        raise RunError(
            "a run resumes with the rows it began with, in their order",
            f"digest {rows}, was {before.rows}",
            "restore the data files, or choose another output",
        )
    now = versions()
    other = [
        f"{name} {old}, now {now[name]}"
        for name, old in before.versions.items()
        if old != now.get(name, old)
    ]
    if other:
        logger.warning(
            "the run was begun with %s; with other versions a resume is not the same to the bit",
            "; ".join(other),
        )


def check_plugins(begun: OpenState, config: RunConfig) -> None:
    """Raise RunError unless the config names the plug-ins that a stage was begun with.

    A run says which code it needs, and never runs it by itself: a run may come from somebody else.
    Warns of a plug-in that has changed since.
    """
    before = _entry(begun).training.plugins
    now = {name: plugin_digest(name) for name in config.plugins}
    known = set(now.values())
    if missing := [name for name in before if name not in now and before[name] not in known]:
        raise RunError(not_named(f"resume {begun.run}", missing))
    if changed := [name for name in before if name in now and before[name] != now[name]]:
        logger.warning(
            "the run was begun with another content of %s; later steps use the new one",
            ", ".join(changed),
        )


def not_named(what: str, plugins: Sequence[str]) -> str:
    """Say what cannot be done without plug-ins that only a run names."""
    return (
        f"Cannot {what}: it was begun with the plug-in {', '.join(plugins)}, code that would run "
        f"here. Add --plugins {','.join(plugins)} if you trust it"
    )


def _science(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a config that decide the weights.

    Not where it is written, what it begins on (its links and kept rows tell), where rows of a task
    and plug-ins lie (`check_plugins`), who watches, which process holds what.
    """
    other: dict[str, Any] = dict.fromkeys(("output", "plugins", *OF_START), True)
    tree = config.model_dump(exclude=other | {"data": {"dir"}})
    for key in ("trackers", "save_every", "log_every", "shard"):
        tree["train"].pop(key)
    flat = {key: tree.pop(key) for key in ("model", "quantize")}
    for section, keys in tree.items():
        flat |= {f"{section}.{key}": value for key, value in keys.items()}
    return flat
