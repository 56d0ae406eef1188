"""Read exports: load one in place of a run, find its lineage, and verify it.

An export is scored like its run: its rows are read by the config in ``lineage.json``, and an
adapter is put on the base that it names. It is verified by checksums, or by every byte of a new
export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from importlib import import_module
from inspect import signature
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from chainlora import files
from chainlora.config.reading import leave_out_helpers, make_config
from chainlora.config.schema import RunConfig
from chainlora.config.template_names import refuse_paths
from chainlora.errors import ModelError, RunError
from chainlora.models.finding import from_above, names_a_file, resolve_model
from chainlora.models.identity import base_files, changed_files
from chainlora.models.loading import load_model
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.addresses import Address, nothing_at, open_run
from chainlora.runs.cards import Naming
from chainlora.runs.costs import versions
from chainlora.runs.entries import BASE, Entry
from chainlora.runs.export import export_adapter, export_merged
from chainlora.runs.lineage import LINEAGE, Lineage, read_lineage
from chainlora.runs.loading_start import load_start, put_on
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base, load_run
from chainlora.runs.paths import is_run, split_address
from chainlora.runs.state import OpenState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chainlora.models.loading import CausalModel

Loaded = tuple["CausalModel", "PreTrainedTokenizerBase"]


def load_run_or_model(
    run_or_model: Address, *, num_links: int | None = None, dtype: str | torch.dtype | None = None
) -> Loaded:
    """Return ``(model, tokenizer)`` of a run, of an adapter on its base, or of a model.

    `num_links` takes only the first links of a run. `dtype` is by default that of the run, also for
    its export; float32 for other models.
    """
    if isinstance(run_or_model, OpenState) or is_run(run_or_model):
        return load_run(run_or_model, num_links=num_links, dtype=dtype, as_trained=True)
    lineage = lineage_at(run_or_model)
    dtype = dtype or ("float32" if lineage is None else lineage.history.base.dtype)
    folder = Path(expanduser(str(run_or_model)))
    if not _is_adapter(folder):
        try:
            folder = resolve_model(str(run_or_model))
        except ModelError as error:
            if names_a_file(str(run_or_model)):
                raise
            raise nothing_at(run_or_model, "model") from error
    if _is_adapter(folder):
        return _adapter_on_base(folder, lineage, dtype)
    return load_model(folder, dtype)


def _is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter and no model."""
    has = [(folder / name).is_file() for name in ("adapter_config.json", "config.json")]
    return has == [True, False]


def _adapter_on_base(folder: Path, lineage: Lineage | None, dtype: str | torch.dtype) -> Loaded:
    """Return an adapter on the base that it names. Raises RunError if the base is not found."""
    start = load_start(folder)
    name = "" if start.adapter is None else start.adapter.base
    if start.state is not None:  # a Trainer's save, with its chain
        name = start.state.base.model
    base_facts = None if lineage is None else lineage.history.base
    quantize = None if base_facts is None else base_facts.quantize
    base = OpenBase(from_above(name, folder), dtype, quantize)
    try:
        base_hashes = base.files
    except ModelError as error:
        rule = "the base of an adapter must be at hand"
        remedy = "set CHAINLORA_MODELS to the folder that holds it, or name it in that file"
        got = f"{name or 'none'} in {folder / 'adapter_config.json'}, which is not found"
        raise RunError(rule, got, remedy) from error
    if base_facts is not None:
        check_base(base_facts, folder, files=base_hashes)
    chain = base.chain(device=None if base.is_quantized else torch.device("cpu"))
    put_on(start, chain)
    model: Any = chain.model
    if not is_quantized_model(model):
        chain.detach()
    return model, base.tokenizer(start.tokenizer)


# --- the lineage of an export ---


def lineage_at(place: str | Path) -> Lineage | None:
    """Return the lineage of an export (its folder, or a GGUF file in it); None of another model."""
    path = Path(expanduser(str(place)))
    folder = path.parent if path.suffix.lower() == ".gguf" else path
    return read_lineage(folder) if (folder / LINEAGE).is_file() else None


def config_of_export(place: str | Path) -> RunConfig | None:
    """Return the config of the last exported stage with rows; None for a model or a saved chain."""
    lineage, last = lineage_at(place), _last_with_rows(place)
    if lineage is None or last is None:
        return None
    tree = deepcopy(lineage.stages[last.key].config)
    refuse_paths(tree, Path(LINEAGE))  # the export may come from somebody else
    leave_out_helpers(tree, LINEAGE)
    return make_config(tree)


def sources_of_export(place: str | Path) -> dict[str, list[str]]:
    """Return the digests of the files of that stage, by config key; none for a model."""
    last = _last_with_rows(place)
    return {} if last is None else last.training.sources


def _last_with_rows(place: str | Path) -> Entry | None:
    lineage = lineage_at(place)
    entries = () if lineage is None else reversed(lineage.history.entries)
    return next((e for e in entries if lineage and e.key in lineage.stages), None)


# --- verifying ---


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

    The state is searched in the whole history of the run; ``RUN@NAME`` must be the state itself.
    Returns the differences, one line each. Raises RunError for a folder without a lineage, and
    ChainLoRAError if the run cannot be exported.
    """
    folder, lineage = Path(export).expanduser(), read_lineage(export)
    checksums = _checksums(folder)
    differences = list(_changes(lineage.files, checksums, "not as it was exported"))
    if run is None:
        return differences
    state = open_run(run)
    if others := list(_other_origin(lineage, state, split_address(run)[1] is not None)):
        return [*differences, *others]
    # the same state is kept as it is, because its stage may be in training
    is_same = state.key == lineage.head
    source = state if is_same else state.at(lineage.head)
    exporter, naming = _exporter(lineage, folder), Naming(**lineage.naming)
    with TemporaryDirectory() as scratch:
        exporter(source, scratch, naming=naming, **lineage.exported)
        differences += _changes(_checksums(Path(scratch)), checksums, f"not what {run} gives")
        new_lineage = read_lineage(scratch)
    before, now = map(_compared, (lineage, new_lineage))
    differences += [f"{LINEAGE}: `{n}` is not what {run} says" for n in now if before[n] != now[n]]
    if differences and lineage.versions != versions():
        differing = sorted(lineage.versions.items() - versions().items())
        shown = ", ".join(f"{name} {number}" for name, number in differing)
        differences.append(f"exported with {shown}, not here")
    return differences


def _compared(lineage: Lineage) -> dict[str, Any]:
    """Return what two lineages of the same state have in common.

    Runs in other places differ in the configs of their links, which name the base's place.
    """
    found = lineage.model_dump(mode="json", include={"state", "history", "stages"})
    for link in found["history"]["links"].values():
        link["files"].pop("adapter_config.json", None)
    return found


def _exporter(lineage: Lineage, folder: Path) -> Callable[..., Any]:
    """Return the function that made an export. Raises RunError for arguments it does not have."""
    exporter = exporter_to(lineage.to)
    for name in lineage.exported.keys() - signature(exporter).parameters.keys():
        rule, got = f"{LINEAGE} must name arguments of an export to {lineage.to}", f"{name!r:.40}"
        raise RunError(rule, f"{got} in {folder}", lineage.remedy)
    return exporter


def _checksums(folder: Path) -> dict[str, str]:
    """Return checksums of an export, without its lineage and files that tools of the Hub add."""
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
    head = lineage.head
    if head != BASE and history.state_of(head) != exported.state_of(head):
        yield f"another run: {run} has no state {head} of these links"
    elif is_named and state.entry != history.find(head):
        exported_state = f"{head}, {exported.state_of(head).digest}"
        yield f"another state: {state} is {state.state.digest}, the export is of {exported_state}"
