"""Check that an output folder can be used, and that a begun stage equals its config."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from chainlora import files
from chainlora.config.schema import DataConfig, RunConfig, StartData
from chainlora.config.staging import OF_START, RUN_WIDE
from chainlora.config.yaml_text import one_value
from chainlora.data.splits import named_sources, source_digest
from chainlora.errors import RunError
from chainlora.models.finding import from_above, is_same_place, resolve_model
from chainlora.models.identity import base_files
from chainlora.registry import plugin_digest
from chainlora.runs.costs import versions
from chainlora.runs.history import CONFIG, START, WEIGHTS, Entry, Training, Unbuilt
from chainlora.runs.loading_start import start_folder
from chainlora.runs.opening import check_base
from chainlora.runs.paths import exists_in
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

Sources = dict[str, list[str]]  # digests of contents, by config key
ADAPTER = "start"  # the key of an adapter, in a config and in its sources

# Keys with paths. They may change on resume if the content is the same, which is checked.
_PLACES = ("model", "data.train", "data.validation", "data.test")


def refuse_if_taken(run: Path) -> None:
    """Raise RunError unless a folder is new or empty."""
    if not run.is_dir():
        return
    with files.reported(run, "read"):
        if not any(run.iterdir()):
            return
    problem, remedy = "is not empty and not a whole run", "choose another output"
    if exists_in(run):
        problem, remedy = "holds a run", f"pass resume=True to resume it, or {remedy}"
    rule = "`output` must be a new or empty directory"
    raise RunError(rule, f"{run}, which {problem}", remedy)


def refuse_if_other(run: Path) -> None:
    """Raise RunError unless a folder is a run, new or empty."""
    if not exists_in(run):
        refuse_if_taken(run)


def compare(begun: OpenState, now: RunConfig, stage: str | None = None) -> None:
    """Compare a begun stage with its config `now`.

    Paths are not compared; contents are. For a stage in training, base and rows are compared later,
    when they are loaded. For a finished stage they are compared here, but only those at a new path,
    and a base in a folder; its files of rows may have grown, or be missing.

    `stage` is the name in messages, if the run has several. Raises RunError for another config, or
    other content.
    """
    before, entry = begun.config(), _entry(begun)
    _compare_start_rows(begun, before, now)
    old, new = _compared_keys(before), _compared_keys(now)
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    allowed = {key for key in differing if _is_same_content(key, begun, before, now)}
    if begun.draft is not None and entry.training.rows is not None:
        places = set(_PLACES).intersection(differing)
        allowed |= {k for k in places if _without_place(old[k]) == _without_place(new[k])}
    for key in differing:
        if key not in allowed:
            raise _other_config(begun, key, old[key], new[key], stage)
    if begun.draft is None:
        _check_model(begun, before.model, now.model)


def need_same_beginning(run: Path, before: RunConfig, now: RunConfig) -> None:
    """Raise RunError if a run without stages was declared on another base or start."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    keys = ["model", "quantize", "start_data"]
    pairs = {key: (old[key], new[key]) for key in keys}
    for part, names in RUN_WIDE.items():
        pairs |= {f"{part}.{name}": (old[part][name], new[part][name]) for name in names}
    for key, (was, given) in pairs.items():
        is_place = key == "model"
        if was != given and not (is_place and is_same_place(was, given, run)):
            got = f"{key} is {one_value(given):.60}, was {one_value(was):.60}"
            remedy = f"delete {shlex.quote(str(run))}, which has no stage yet, or repeat the "
            raise RunError("a run begins as it was declared", got, f"{remedy}command that began it")


def _entry(begun: OpenState) -> Entry:
    assert begun.entry is not None
    return begun.entry


def _compare_start_rows(begun: OpenState, before: RunConfig, now: RunConfig) -> None:
    """Raise RunError if `start_data` names other rows than the run has kept."""
    if now.start_data in (None, before.start_data):
        return
    if now.start_data == "none" and START in begun.keepers:
        raise _other_start_rows(begun, "none")
    old, new = (
        (data if isinstance(data, StartData) else StartData.model_construct()).model_dump()
        for data in (before.start_data, now.start_data)
    )
    old_digests, new_digests = _entry(begun).training.sources, start_digests(now)
    for key in (key for key in new if new[key] != old[key]):
        digest = old_digests.get(f"start_{key}")
        if digest is None or digest != new_digests.get(f"start_{key}"):
            raise _other_start_rows(begun, f"another start_data.{key}, {new[key]!r:.60},")


def _other_start_rows(begun: OpenState, got: str) -> RunError:
    matrix = f"chainlora eval {shlex.quote(str(begun.run))} --matrix"
    remedy = f"leave it as it was, or replace the rows: {matrix}"
    rule = "`start_data` is read when a run begins"
    return RunError(rule, f"{got} for {begun.run}", f"{remedy} --start-rows FILE")


def source_digests(config: RunConfig) -> dict[str, list[str]]:
    """Return digests of the contents of a config's task and files of rows, by their keys."""
    return _digests(config.data) | start_digests(config)


def adapter_digests(adapter: str) -> list[str]:
    """Return the SHA-256 of the config and of the weights of an adapter."""
    folder = start_folder(adapter)
    names = ("adapter_config.json", WEIGHTS)
    with files.reported(folder, "read"):
        return [files.sha256(folder / name) for name in names]


def import_sources(config: RunConfig) -> Sources:
    """Return digests of all that the import of an adapter reads."""
    return source_digests(config) | {ADAPTER: adapter_digests(str(config.start))}


def need_same_sources(run: Path, declared: Unbuilt, now: Sources) -> None:
    """Raise RunError unless the files of an entry have the digests that it was declared with.

    Every entry is checked here before a row or tensor of its files is stored: its run may come from
    somebody else, and name any file of this machine.
    """
    if now != declared.training.sources:
        rule = f"Cannot build {declared.key}: its files must not change after it was declared"
        prune = f"chainlora prune {shlex.quote(str(run))} {declared.key} --yes"
        remedy = "restore them or repeat its command"
        remedy += "" if declared.key == START else f", or {prune}"
        raise RunError(rule, f"changed ones for {declared.key}", remedy)


def start_digests(config: RunConfig) -> dict[str, list[str]]:
    """Return digests of the contents of `start_data`, by ``start_KEY``."""
    if not isinstance(config.start_data, StartData):
        return {}
    by_key = _digests(config.start_data.as_data(config.data))
    return {key.replace("data.", "start_", 1): digests for key, digests in by_key.items()}


def _digests(data: DataConfig) -> dict[str, list[str]]:
    return {
        key: [source_digest(key, source.path, data) for source in sources]
        for key, sources in named_sources(data).items()
        if all(source.path for source in sources)  # `start_data` may have no `train`
    }


def _other_config(begun: OpenState, key: str, old: Any, new: Any, stage: str | None) -> RunError:
    """Return the error for a config key that differs from the begun stage."""
    run, has_ended = begun.run, begun.draft is None
    differs = f"{key} is {one_value(new):.60}, was {one_value(old):.60}"
    if key in _entry(begun).training.sources and has_ended:
        differs += ", compared by content"
    if stage is not None:
        rule, got = "a stage keeps the config it began with", f"stage {stage!r}: {differs}"
        remedy = "give the new stage another name (--name)"
    elif has_ended:
        rule, got = "a run that has ended keeps its config", f"{differs} in {run}"
        add = f"chainlora extend {shlex.quote(str(run))} FILE"
        remedy = f"choose another output, or add a stage to it: {add}"
    else:
        rule, got = "a run resumes with the config it began with", f"{differs} in {run}"
        remedy = f"use {begun.folder / CONFIG}, or choose another output"
    return RunError(rule, got, remedy)


def _is_same_content(key: str, begun: OpenState, before: RunConfig, now: RunConfig) -> bool:
    """Say whether the paths of a key have the same content as when the run began."""
    if key == "model":
        return begun.draft is None  # compared by `_check_model`
    old, new = (named_sources(config.data).get(key, []) for config in (before, now))
    digests = _entry(begun).training.sources.get(key)
    known: Sequence[str | None] = digests or [None] * len(old)
    return (
        bool(old)
        and len(old) == len(new) == len(known)
        and all(
            one.weight == two.weight
            and (
                is_same_place(one.path, two.path, begun.run)
                or source_digest(key, two.path, now.data) == digest
            )
            for one, two, digest in zip(old, new, known, strict=True)
        )
    )


def _check_model(begun: OpenState, before: str, now: str) -> None:
    """Raise RunError for another base. A Hub id that has not changed is not read."""
    name = from_above(now, begun.run)
    if now != before or Path(name).is_dir():
        check_base(begun.base, begun.run, files=base_files(resolve_model(name)))


def _without_place(value: Any) -> Any:
    """Return the value of a path key without its folders, to compare two values.

    A single path becomes a constant. Several files keep their names, because the digest of all rows
    does not show which row comes from which file.
    """
    if isinstance(value, list | tuple):
        return [(PurePath(source["path"]).name, source["weight"]) for source in value]
    return str if isinstance(value, str) else value


def check_resumed(before: Training, rows: str) -> None:
    """Raise RunError unless the rows are the same as when the stage began.

    Warn if versions have changed: the resume makes the same steps, but may round differently.
    """
    if before.rows != rows:
        raise RunError(
            "a run resumes with the rows it began with, in their order",
            f"digest {rows}, was {before.rows}",
            "restore the data files, or choose another output",
        )
    current = versions()
    changed = [
        f"{name} {old}, now {current[name]}"
        for name, old in before.versions.items()
        if old != current.get(name, old)
    ]
    if changed:
        logger.warning(
            "the run was begun with %s; with other versions a resume is not the same to the bit",
            "; ".join(changed),
        )


def check_plugins(begun: OpenState, config: RunConfig) -> None:
    """Raise RunError unless the config names the plug-ins that a stage was begun with.

    A run records its plug-ins but never loads them, because it may come from somebody else. Warns
    if a plug-in has changed.
    """
    before = _entry(begun).training.plugins
    given = {name: plugin_digest(name) for name in config.plugins}
    known = set(given.values())
    if missing := [name for name in before if name not in given and before[name] not in known]:
        raise RunError(not_named(f"resume {begun.run}", missing))
    if changed := [name for name in before if name in given and before[name] != given[name]]:
        logger.warning(
            "the run was begun with another content of %s; later steps use the new one",
            ", ".join(changed),
        )


def not_named(what: str, plugins: Sequence[str]) -> str:
    """Return the message for a command that lacks plug-ins recorded in a run."""
    return (
        f"Cannot {what}: it was begun with the plug-in {', '.join(plugins)}, code that would run "
        f"here. Add --plugins {','.join(plugins)} if you trust it"
    )


def _compared_keys(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a config that decide the weights, by their dotted names.

    Left out are the output, the start (its links and kept rows are compared), plug-ins
    (`check_plugins`), trackers and logs, and the sharding of the model.
    """
    left_out: dict[str, Any] = dict.fromkeys(("output", "plugins", *OF_START), True)
    tree = config.model_dump(exclude=left_out)
    for key in ("trackers", "save_every", "log_every", "shard"):
        tree["train"].pop(key)
    flat = {key: tree.pop(key) for key in ("model", "quantize")}
    for section, keys in tree.items():
        flat |= {f"{section}.{key}": value for key, value in keys.items()}
    return flat
