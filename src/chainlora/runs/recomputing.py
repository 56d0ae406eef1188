"""Verify an export: check its files by checksums, or compare every byte with a new export."""

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

    GGUF is written by a package that depends on this one, so it is imported by name.
    """
    if target.startswith("gguf"):
        is_adapter = target == "gguf-adapter"
        return partial(import_module("chainlora_gguf").export_gguf, as_adapter=is_adapter)
    return {"merged": export_merged, "adapter": export_adapter}[target]


def verify_export(export: str | Path, run: str | Path | None = None) -> list[str]:
    """Compare an export with its checksums, and with a new export of a `run`.

    Names that begin with a dot are skipped; tools of the Hub create such files.

    Args:
        export: the folder of the export.
        run: the run that it was exported from. The state is searched in its whole history;
            ``RUN@NAME`` must be the state itself.

    Returns:
        The differences, one line each.

    Raises:
        RunError: a folder without a lineage.
        ChainLoRAError: the run cannot be exported.
    """
    folder, lineage = Path(export).expanduser(), read_lineage(export)
    checksums = _checksums(folder)
    differences = list(_changes(lineage.files, checksums, "not as it was exported"))
    if run is None:
        return differences
    state = open_run(run)
    if others := list(_other_origin(lineage, state, split_address(run)[1] is not None)):
        return [*differences, *others]
    source = state.at(lineage.history.head)
    if lineage.exported.get("num_links") is None:
        source = replace(source, state=lineage.state)
    exporter, naming = _exporter(lineage, folder), Naming(**lineage.naming)
    with TemporaryDirectory() as scratch:
        exporter(source, scratch, naming=naming, **lineage.exported)
        differences += _changes(_checksums(Path(scratch)), checksums, f"not what {run} gives")
        new_lineage = read_lineage(scratch)
    for name in ("state", "history", "stages"):
        if getattr(new_lineage, name) != getattr(lineage, name):
            differences.append(f"{LINEAGE}: `{name}` is not what {run} says")
    if differences and lineage.versions != versions():
        differing = sorted(lineage.versions.items() - versions().items())
        shown = ", ".join(f"{name} {number}" for name, number in differing)
        differences.append(f"exported with {shown}, not here")
    return differences


def _exporter(lineage: Lineage, folder: Path) -> Callable[..., Any]:
    """Return the function that made an export. Raises RunError for arguments it does not have."""
    exporter = exporter_to(lineage.to)
    for name in lineage.exported.keys() - signature(exporter).parameters.keys():
        rule, got = f"{LINEAGE} must name arguments of an export to {lineage.to}", f"{name!r:.40}"
        raise RunError(rule, f"{got} in {folder}", lineage.remedy)
    return exporter


def _checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of the files of an export, without its lineage."""
    sums = files.checksums(folder)
    return {name: d for name, d in sums.items() if name != LINEAGE and not name.startswith(".")}


def _changes(before: Mapping[str, str], after: Mapping[str, str], change: str) -> Iterator[str]:
    """Yield a line for each file that is missing, added, or changed (described by `change`)."""
    for name in changed_files(before, after):
        kind = "missing" if name not in after else "added" if name not in before else change
        yield f"{name}: {kind}"


def _other_origin(lineage: Lineage, state: OpenState, is_named: bool) -> Iterator[str]:
    """Yield the reason why an export is not of this run, or not of the named state."""
    exported, history, run = lineage.history, state.history, state.run
    if exported.base.files is not None:  # a saved chain has no hashes
        folder = resolve_model(state.base.model)
        for hashes, place in ((history.base.files, run), (base_files(folder), folder)):
            if changed := changed_files(exported.base.files, hashes or {}):
                yield f"another base: {place} has another {', '.join(changed)}"
                return
    head = exported.head
    if head != BASE and history.state_of(head) != exported.state_of(head):
        yield f"another run: {run} has no state {head} of these links"
    elif is_named and state.entry != history.find(head):
        exported_state = f"{head}, {exported.state_of(head).digest}"
        yield f"another state: {state} is {state.state.digest}, the export is of {exported_state}"
