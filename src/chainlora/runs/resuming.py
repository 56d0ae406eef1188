"""Check that an output folder can be used, and that a stage of a run equals its config."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.schema import DataConfig, RunConfig, StartData
from chainlora.config.yaml_text import one_value
from chainlora.data.splits import named_sources, source_digest
from chainlora.errors import ChainLoRAError, RunError
from chainlora.models.finding import from_above, is_same_place, resolve_model
from chainlora.models.identity import base_files
from chainlora.registry import plugin_digest
from chainlora.runs.costs import versions
from chainlora.runs.entries import WEIGHTS, Training
from chainlora.runs.loading_start import start_folder
from chainlora.runs.opening import check_base
from chainlora.runs.recipes import Stage, bits_of
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

Sources = dict[str, list[str]]  # digests of contents, by config key
ADAPTER = "start"  # the key of an adapter, in a config and in its sources


def need_same(run: OpenState, before: Stage, now: RunConfig, *, has_ended: bool) -> None:
    """Raise RunError unless a stage of a run has the keys of a config, and the run its base.

    This is the only comparison of a plan with a config. Files that an ended stage has at another
    place are compared by content; files at their place may have changed, which is told. The files
    of another stage are checked when it begins.
    """
    old, new = bits_of(before.config), bits_of(now.model_dump(mode="json"))
    if differing := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
        raise _other_config(run, before, now, differing[0], has_ended=has_ended)
    _need_same_base(run, before.config, now)
    if has_ended:
        _need_same_files(run, before, now)


def _need_same_files(run: OpenState, stage: Stage, now: RunConfig) -> None:
    """Raise RunError if a config names other files for an ended stage, with other contents.

    A file at its place may have changed or be gone: a change is told, the stage stays.
    """
    before = named_sources(DataConfig.model_validate(stage.config.get("data")))
    for key, sources in named_sources(now.data).items():
        pairs = list(zip(before.get(key, []), sources, strict=False))
        is_moved = not all(is_same_place(old.path, new.path, run.run) for old, new in pairs)
        try:
            digests = [source_digest(key, source.path, now.data) for source in sources]
        except ChainLoRAError:
            if is_moved:
                raise
            continue
        if digests == stage.sources.get(key):
            continue
        if is_moved or len(pairs) < len(sources):
            raise _other_config(run, stage, now, key, has_ended=True)
        told = "%s: %s has changed since it was trained; the stage stays as it is"
        logger.warning(told, stage.name, key)


def _need_same_base(run: OpenState, before: dict[str, Any], now: RunConfig) -> None:
    """Raise RunError for another base, or other keys that all stages of a run share."""
    if before.get("quantize") != now.quantize:
        rule, remedy = f"all stages of {run.run} share their base", "choose another output"
        got = f"quantize is {one_value(now.quantize)}, was {one_value(before.get('quantize'))}"
        raise RunError(rule, got, f"leave it out, or {remedy}")
    name = from_above(now.model, run.run)
    is_moved = not is_same_place(str(before.get("model")), now.model, run.run)
    if run.base.files is not None and (is_moved or Path(name).is_dir()):
        check_base(run.base, run.run, files=base_files(resolve_model(name)))


def need_same_start(run: OpenState, now: RunConfig) -> None:
    """Raise RunError if `start_data` names other rows than those with which a run began."""
    if now.start_data is None:
        return
    before, given = run.history.general, now.model_dump(mode="json")["start_data"]
    if before is not None and before.get("start_data") == given:
        return
    new = general_of(now)
    if (before and before.get("sources")) != (new and new.get("sources")):
        matrix = f"chainlora eval {shlex.quote(str(run.run))} --matrix --start-rows FILE"
        rule = "`start_data` is read when a run begins"
        got = f"{'none' if new is None else 'others'} for {run.run}"
        got += ", which keeps none" * (before is None)
        raise RunError(rule, got, f"leave it out; {matrix} replaces the rows that are scored")


def general_of(config: RunConfig) -> dict[str, Any] | None:
    """Return how a run that begins with a config gets rows of its base; None: it keeps none."""
    if config.start_data == "none" or (config.start_data is None and not config.data.keep_rows):
        return None
    data = config.model_dump(mode="json")
    keys = ("chat_template", "template_arguments", "max_length", "truncation", "format")
    bits: dict[str, Any] = {key: data["data"][key] for key in keys}
    for key, value in (data["start_data"] or {}).items():
        is_place = key in ("train", "validation", "test", "task") and isinstance(value, str)
        bits[f"start_{key}"] = "a file" if is_place else value
    sources = start_digests(config)
    return {"bits": bits, "sources": sources, "start_data": data["start_data"]}


def source_digests(config: RunConfig) -> Sources:
    """Return digests of the contents of a config's task, files of rows and adapter, by keys."""
    adapter = {ADAPTER: adapter_digests(config.start)} if config.start else {}
    return _digests(config.data) | adapter


def adapter_digests(adapter: str) -> list[str]:
    """Return the SHA-256 of the config and of the weights of an adapter."""
    folder = start_folder(adapter)
    names = ("adapter_config.json", WEIGHTS)
    with files.reported(folder, "read"):
        return [files.sha256(folder / name) for name in names]


def need_pinned(run: Path, name: str, known: Sources, now: Sources) -> None:
    """Raise RunError unless the files of the entry `name` have the digests that a run names.

    Every file is checked here before a row or tensor of it is stored: the run may come from
    somebody else, and name any file of this machine.
    """
    if now != known:
        rule = f"Cannot build {name}: its files must not change before it is built"
        undo = f"chainlora undo {shlex.quote(str(run))}"
        remedy = f"restore them, or {undo} and repeat the command"
        raise RunError(rule, f"changed ones for {name}", remedy)


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


def _other_config(
    run: OpenState, stage: Stage, now: RunConfig, key: str, *, has_ended: bool
) -> RunError:
    """Return the error for a config key that differs from a stage of the run."""
    part, name = key.split(".")
    configs = (stage.config, now.model_dump(mode="json"))
    old, new = ((config.get(part) or {}).get(name) for config in configs)
    got = f"{key} is {one_value(new):.60}, was {one_value(old):.60}"
    if key in stage.sources and has_ended:
        got += ", compared by content"
    remedy = "use that config, give the new stage another name (--name), or choose another output"
    rule = "a stage keeps the config it began with"
    return RunError(rule, f"stage {stage.name!r}: {got} in {run.run}", remedy)


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


def check_plugins(stage: Stage, run: Path, config: RunConfig) -> None:
    """Raise RunError unless a config names the plug-ins that a stage was begun with.

    A run records its plug-ins but never loads them, because it may come from somebody else. Warns
    if a plug-in has changed.
    """
    before = stage.plugins
    given = {name: plugin_digest(name) for name in config.plugins}
    known = set(given.values())
    if missing := [name for name in before if name not in given and before[name] not in known]:
        raise RunError(not_named(f"resume {run}", missing))
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
