"""Verify an export: the checksums of its files, and every byte against the run that it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chainlora import files
from chainlora.errors import RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files, changed_files
from chainlora.runs.addresses import open_run
from chainlora.runs.cards import Naming
from chainlora.runs.costs import versions
from chainlora.runs.export import export_adapter, export_merged
from chainlora.runs.history import BASE
from chainlora.runs.lineage import LINEAGE, Lineage, read_lineage
from chainlora.runs.paths import split_address
from chainlora.runs.state import OpenState


def exporter_to(target: str) -> Callable[..., Any]:
    """Return the function that exports to a `lineage.Target`.

    GGUF is written by a package that is built on this one, so that is imported by name.
    """
    if target.startswith("gguf"):
        is_adapter = target == "gguf-adapter"
        return partial(import_module("chainlora_gguf").export_gguf, as_adapter=is_adapter)
    return {"merged": export_merged, "adapter": export_adapter}[target]


def verify_export(export: str | Path, run: str | Path | None = None) -> list[str]:
    """Return what differs, a line each: files of an export from their checksums, and with a `run`
    the export from what that run gives.

    The state is looked for in the whole history of `run`; ``RUN@NAME`` must be the state itself.
    Names that begin with a dot, as tools of the Hub leave them, are not looked at.

    Raises RunError for a folder without a lineage, and what exporting raises.
    """
    folder, lineage = Path(export).expanduser(), read_lineage(export)
    now = _checksums(folder)
    found = list(_changes(lineage.files, now, "not as it was exported"))
    if run is None:
        return found
    state = open_run(run)
    if others := list(_other_origin(lineage, state, split_address(run)[1] is not None)):
        return [*found, *others]
    source = state.at(lineage.history.head)
    if lineage.exported.get("num_links") is None:
        source = replace(source, state=lineage.state)
    exporter, naming = _exporter(lineage, folder), Naming(**lineage.naming)
    with TemporaryDirectory() as scratch:
        exporter(source, scratch, naming=naming, **lineage.exported)
        found += _changes(_checksums(Path(scratch)), now, f"not what {run} gives")
        again = read_lineage(scratch)
    for name in ("state", "history", "stages"):
        if getattr(again, name) != getattr(lineage, name):
            found.append(f"{LINEAGE}: `{name}` is not what {run} says")
    if found and lineage.versions != versions():
        known = lineage.versions.items() - versions().items()
        found.append(f"exported with {', '.join(f'{k} {v}' for k, v in sorted(known))}, not here")
    return found


def _exporter(lineage: Lineage, folder: Path) -> Callable[..., Any]:
    """Return what made an export. Raises RunError for arguments that it does not take."""
    exporter = exporter_to(lineage.to)
    for name in lineage.exported.keys() - signature(exporter).parameters.keys():
        rule, got = f"{LINEAGE} must name arguments of an export to {lineage.to}", f"{name!r:.40}"
        raise RunError(rule, f"{got} in {folder}", lineage.remedy)
    return exporter


def _checksums(folder: Path) -> dict[str, str]:
    found = files.checksums(folder)
    return {name: d for name, d in found.items() if name != LINEAGE and not name.startswith(".")}


def _changes(before: Mapping[str, str], now: Mapping[str, str], what: str) -> Iterator[str]:
    for name in changed_files(before, now):
        yield f"{name}: {'missing' if name not in now else 'added' if name not in before else what}"


def _other_origin(lineage: Lineage, state: OpenState, is_named: bool) -> Iterator[str]:
    """Yield why an export is not of a run, or of the state that was named."""
    known, own, run = lineage.history, state.history, state.run
    if known.base.files is not None:  # a saved chain has none
        place = resolve_model(state.base.model)
        for there, where in ((own.base.files, run), (base_files(place), place)):
            if changed := changed_files(known.base.files, there or {}):
                yield f"another base: {where} has another {', '.join(changed)}"
                return
    if known.head != BASE and own.state_of(known.head) != known.state_of(known.head):
        yield f"another run: {run} has no state {known.head} of these links"
    elif is_named and state.entry != own.find(known.head):
        own_state = f"{known.head}, {known.state_of(known.head).digest}"
        yield f"another state: {state} is {state.state.digest}, the export is of {own_state}"
