"""Declare entries of a run before they are computed, and withdraw them.

A declaration is one replacement of ``history.json``, under the run's lock. A new run is filled in a
scratch folder and then renamed, so it appears complete, with its first entries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.reading import make_config
from chainlora.config.schema import RunConfig
from chainlora.config.template_names import refuse_paths
from chainlora.data.kept import keeps_general
from chainlora.errors import FileError, RunError
from chainlora.registry import plugin_digest
from chainlora.runs.beginning import copy_files, copy_tokenizer, own_closure
from chainlora.runs.documents import write_part
from chainlora.runs.history import BASE, START, Base, History, Training, Unbuilt
from chainlora.runs.history_file import update_history
from chainlora.runs.loading_start import Start
from chainlora.runs.paths import HISTORY, exists_in
from chainlora.runs.resuming import source_digests, start_digests

logger = logging.getLogger(__name__)


def stage_entry(name: str, config: RunConfig, parent: str, unit: str) -> Unbuilt:
    """Return the declaration of a stage, with digests of its files of rows and plug-ins."""
    plugins = {name: plugin_digest(name) for name in config.plugins}
    return Unbuilt(
        key=name,
        kind="stage",
        parents=() if parent == BASE else (parent,),
        unit=unit,
        training=Training(sources=source_digests(config), plugins=plugins),
        config=config.model_dump(mode="json"),
    )


def declared_config(run: Path, entry: Unbuilt) -> RunConfig:
    """Return the config of a declared entry. Raises ConfigError for paths in template names."""
    tree = entry.config | {"output": str(run)}
    refuse_paths(tree, run / HISTORY)
    return make_config(tree)


def history_of_start(start: Start, base: Base, config: RunConfig, unit: str) -> History:
    """Return the first history of a run that begins on `start`; write nothing.

    It names the entries and links to copy from another run. Rows of the base are declared as the
    entry ``start``.
    """
    history = History(base=base, hold=config.chain.hold, seed=config.train.seed)
    if start.state is not None:
        copied = own_closure(start.state)
        keys = ("entries", "links", "head", "origin")
        history = history.model_copy(update={key: getattr(copied, key) for key in keys})
    is_general = start.state is None and keeps_general(config)
    if not is_general and config.start_data in (None, "none"):
        return history
    known: Any = {"unit": unit, "training": Training(sources=start_digests(config))}
    given = Unbuilt(key=START, kind="import", config=config.model_dump(mode="json"), **known)
    origin = START if start.state is None else history.origin
    return history.model_copy(update={"unbuilt": (given,), "origin": origin})


def declare(
    run: Path, planned: History, new: Sequence[Unbuilt], target: str | None, start: Start
) -> None:
    """Write new entries and a target into the history of a run; create a new run on `start`.

    `planned` is the history that the plan was made for. Raises RunError if another process begins
    the same run.
    """
    if exists_in(run):
        for entry in new:
            if planned.find_unbuilt(entry.key) not in (None, entry):
                logger.warning("%s of %s had not begun and is replaced", entry.key, run)
        update_history(run, lambda now: planned.declared(new, target))
        return
    with files.reported(run):
        if (writer := files.writer_of(run)) is not None:
            got = f"process {writer} begins it"
            raise RunError(f"Cannot write {run}: {got}. Wait for it, or choose another output.")
        files.remove_scratch(run.parent, run.name)  # of a process that was killed
    with files.replaced_folder(run, only_empty=True) as scratch:
        _begin(scratch, planned.declared(new, target), start)


def _begin(folder: Path, history: History, start: Start) -> None:
    """Fill the folder of a new run; its history is written last."""
    if start.tokenizer is not None:
        sums = copy_tokenizer(start.tokenizer, folder)
        history = history.model_copy(update={"tokenizer": sums})
    if start.state is not None:
        copy_files(start.state.run, folder, own_closure(start.state))
    write_part(folder / HISTORY, history)


def withdraw(run: Path, keys: Iterable[str], *, is_new_run: bool) -> None:
    """Remove declared entries; delete a run without entries, or a new run with copies alone."""
    after = update_history(run, lambda history: history.withdrawn(keys))
    if after.unbuilt or after.own or (after.entries and not is_new_run):
        return
    with suppress(FileError):  # if it stays, it is a run without stages; the next command uses it
        files.remove(run)
