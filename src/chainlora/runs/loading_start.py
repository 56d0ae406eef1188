"""Where a chain can begin: a finished run, a saved chain, or a LoRA that PEFT has saved elsewhere.

`with_start` fills in a config that begins there, and `load_start` reads it, both before there is a
model; `fitted` checks that a model is the right one, and `put_on` puts the links on too.
`load_chain` is all of it, for Python.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from os.path import expanduser
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import MERGE, Imported, dequantized, import_adapter, linked_layer
from chainlora.chain.chain import Chain
from chainlora.chain.checks import check_link
from chainlora.chain.holding import hold_for
from chainlora.chain.initialization import generator_for, principal_factors
from chainlora.chain.link import Factors, Link
from chainlora.config.schema import with_flat_model
from chainlora.config.staging import RUN_WIDE, name_apart, section_of, what_stages_share
from chainlora.errors import ChainLoRAError, ConfigError, ModelError, RunError
from chainlora.models.finding import folder_of, from_hub, hub_id_of, is_same_place, name_of
from chainlora.models.identity import base_files, has_tokenizer
from chainlora.models.shards import is_shard
from chainlora.runs.addresses import begun_stage, nothing_at, open_run
from chainlora.runs.cards import is_hub_id
from chainlora.runs.draft import drafts_in
from chainlora.runs.history_file import read_history
from chainlora.runs.opening import check_base
from chainlora.runs.paths import HISTORY, exists_in, is_run, refuse_older
from chainlora.runs.saved_chain import chain_folder, read_chain, restore_chain
from chainlora.runs.start import Start
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)


def load_start(source: str | Path) -> Start:
    """Read what a stage can begin on.

    `source` is a run, or a state of it; a saved chain, or a trainer's checkpoint, which has one
    inside; or the folder or Hub id of a LoRA that PEFT has saved. Raises ChainLoRAError for what
    has no links, or cannot become links.
    """
    if is_run(source):
        state = open_run(source)
        if state.draft is not None:
            rule = "a chain starts from a finished run"
            raise RunError(rule, state.run, "finish it by the command that began it")
        return start_at(state)
    folder = start_folder(source)
    refuse_older(folder)
    tokenizer = folder if has_tokenizer(folder) else None
    inside = chain_folder(folder)
    if exists_in(inside):
        start = start_at(open_run(inside))
        return replace(start, tokenizer=tokenizer or start.tokenizer)
    if (folder / "adapter_config.json").is_file():
        found = import_adapter(folder)
        link = Link(0, found.config, found.factors)
        revision = found.stored.get("revision")
        notes = (f"the adapter is for revision {revision} of its base",) if revision else ()
        return Start(links=(link,), adapter=found, tokenizer=tokenizer, notes=notes)
    raise RunError(
        "a chain starts from a run, a saved chain or an adapter",
        f"no {HISTORY} and no adapter_config.json in {folder}",
        "name another folder, or give a whole model as the model",
    )


def start_folder(source: str | Path) -> Path:
    """Return the folder of an adapter or a saved chain; that of a Hub id lies in the Hub's cache.

    Raises RunError where there is none.
    """
    folder = Path(expanduser(source))
    if folder.exists():
        return folder
    try:
        return from_hub(str(source))
    except ModelError as error:
        raise nothing_at(source, "adapter") from error


def start_at(state: OpenState) -> Start:
    """Return what a stage begins on at a state: the links, the best point if it was kept."""
    return Start(state=state, links=tuple(state.links()), tokenizer=state.tokenizer())


def fitted(start: Start, chain: Chain, name: str | None = None) -> Start:
    """Return a start with the notes that the model of a chain completes.

    `name` is what the model is called; by default, what it calls itself. Raises ModelError or
    RunError for a model that the links are not for.
    """
    if (adapter := start.adapter) is not None:
        _check_fit(adapter, chain.model)
        own = name_of(chain.model)
        notes = _other_name(adapter, name or hub_id_of(own) or own)
        start = replace(start, notes=start.notes + notes)
        return _without_dora(start, adapter.magnitudes, chain.model)
    base = None if start.state is None else start.state.base
    if base is not None:
        folder = folder_of(chain.model)
        files = base_files(folder) if folder and base.files is not None else None
        fingerprint = chain.base_fingerprint
        check_base(base, "the earlier stage", files=files, fingerprint=fingerprint)
    return start


def put_on(start: Start, chain: Chain) -> Start:
    """Add the links to a chain of none; return the start as `fitted` does.

    Nothing changes where the model is refused.
    """
    start = fitted(start, chain)
    chain.add(*start.links)
    return start


def load_chain(
    directory: str | Path, model: nn.Module, *, checkpoint: str | Path | None = None
) -> Chain:
    """Return a chain on the model that it was tuned on.

    `directory` is a saved chain, whose live link goes on to the same bits; a trainer's checkpoint;
    a finished run, or ``RUN@STAGE``; or the folder or Hub id of a LoRA that PEFT has saved, which
    becomes one link. `checkpoint` is the folder that the model was loaded from, as for `Chain`; by
    default the one that the model names, if it is at hand. Raises ChainLoRAError for a damaged
    folder or another base.
    """
    place = checkpoint or folder_of(model)
    found = directory if is_run(directory) else chain_folder(Path(expanduser(directory)))
    state = open_run(found) if is_run(found) else None
    if state is None:
        chain = Chain(model, hold=hold_for(model), checkpoint=place)
    else:
        history = state.history
        chain = Chain(model, seed=history.seed, hold=history.hold, checkpoint=place)
    if state is not None and not state.has_run:
        restore_chain(chain, read_chain(state))
        return chain
    for note in put_on(load_start(directory), chain).notes:
        logger.warning(note)
    return chain


def _check_fit(adapter: Imported, model: nn.Module) -> None:
    """Raise ModelError unless a model has the layers, and the embeddings, of an adapter."""
    need_layers(adapter, model)
    found = dict(model.named_parameters(remove_duplicate=False))
    for path, weight in adapter.kept.items():
        own = found.get(path)
        if own is None or own.shape != weight.shape or not _same_values(own, weight):
            rows = 0 if own is None else own.shape[0]
            raise ModelError(
                "the vocabulary of an adapter must be that of its base",
                f"{weight.shape[0]} rows for {rows}, or other values, at {path}",
                MERGE,
            )


def need_layers(adapter: Imported, model: nn.Module) -> None:
    """Raise ModelError unless a model, with or without weights, has the layers of an adapter."""
    lacking = sorted(name for name in adapter.factors if linked_layer(model, name) is None)
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ModelError(
            "a model must have the layers that an adapter is for",
            f"none at {', '.join(lacking[:3])}{more}",
            f"take the base of the adapter, {adapter.base or 'which it does not name'}",
        )


def _without_dora(start: Start, magnitudes: Mapping[str, Tensor], model: nn.Module) -> Start:
    """Return a start from a DoRA adapter (arXiv 2402.09353) as the nearest LoRA of its rank.

    DoRA scales the rows of ``W + s·B·A`` to its magnitudes, which changes W by a matrix of full
    rank. The link keeps the leading singular directions of that change.
    """
    if not magnitudes:
        return start
    (link,), factors, change, left = start.links, dict[str, Factors](), 0.0, 0.0
    check_link(link, model)
    for name, magnitude in magnitudes.items():
        layer = linked_layer(model, name)
        if is_shard(layer.weight):
            raise ModelError("a DoRA adapter needs whole weights", f"a share of {name}", MERGE)
        weight = dequantized(layer)
        tuned = weight + link.delta_weight(name)
        update = tuned * (magnitude / tuned.norm(dim=1)).unsqueeze(1) - weight
        if not update.isfinite().all():
            raise ModelError("a DoRA adapter must leave finite weights", f"others at {name}", MERGE)
        pair = principal_factors(link.config, update, generator_for(0, "dora", name))
        factors[name] = pair
        change += float(update.square().sum())
        left += float((update - link.scaling * pair.b @ pair.a).square().sum())
    error = math.sqrt(left / change) if change else 0.0
    note = (
        f"the adapter is DoRA, whose update is not low-rank: the link is the nearest LoRA of rank "
        f"{link.rank}, with a relative error of {error:.2g}"
    )
    link = replace(link, factors=factors, error=error)
    return replace(start, links=(link,), notes=(*start.notes, note))


def _same_values(own: Tensor, stored: Tensor) -> bool:
    """Compare a parameter with what was saved of one, in the narrower of their dtypes."""
    return torch.equal(own.detach().cpu().to(stored.dtype).to(own.dtype), stored.to(own.dtype))


def _other_name(adapter: Imported, name: str) -> tuple[str, ...]:
    """Return a note where a model has another name than the base of an adapter.

    Folders are known by the last part of their path.
    """
    names = [adapter.base, name]
    if not all(map(is_hub_id, names)):
        names = [PureWindowsPath(each).name for each in names]  # knows both separators
    if not all(names) or names[0] == names[1]:
        return ()
    return (
        f"the adapter is for another base, {adapter.base}, than {name}; their shapes agree, what "
        "they compute may not",
    )


def with_start(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what is left out beside `start`: the base, and what the run has one of.

    A run that has begun says it itself, and what its stage is called, so that a resume does not
    need what it began on. Raises ConfigError for a key of the whole run that says otherwise than
    the run that is begun on, and for another `start` than a run had.
    """
    try:
        own, source = with_flat_model(tree), tree.get("start")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if isinstance(source, Path):
        source = own["start"] = str(source)
    begun = first_stage(Path(expanduser(str(own.get("output")))))
    if not isinstance(source, str):  # none, or what the config will refuse
        if source is None and begun is not None:
            own.setdefault("stages", [{"name": begun.stage}])
        return own
    if begun is not None:
        config = begun.config()
        before = config.start or "the base"
        if source != before and not _is_same_start(before, source, begun):
            raise ConfigError(
                "`start` must be what the run began on",
                f"{source}, and {before} for {begun.run}",
                "choose another output",
            )
        shared = what_stages_share(config)
        whole = {key: shared[key] for key in ("model", "quantize")}
        whole["stages"] = [{"name": begun.stage}]
        parts = {
            section: {key: shared[section][key] for key in keys} | section_of(own, section)
            for section, keys in RUN_WIDE.items()
        }
        return whole | own | parts
    state = open_run(source) if is_run(source) else None
    has_run = state is not None and state.has_run
    start = Start(state=state) if has_run else load_start(source)
    if "stages" not in own:
        own["stages"] = [{"name": name_apart(str(own.get("output")), start.stages)}]
    if state is None or not has_run:
        named = start.adapter.base if start.adapter is not None else None
        base = named if start.state is None else start.state.base.model
        if base:
            own.setdefault("model", base)
        return own
    shared = what_stages_share(state.config())
    given, model = own.get("model"), state.base.model  # found from the run
    if isinstance(given, str) and (
        given == shared["model"] or is_same_place(shared["model"], given, state.run)
    ):
        own["model"] = model
    _agree(own, "model", model, "model")
    _agree(own, "quantize", shared["quantize"], "quantize")
    for section, keys in RUN_WIDE.items():
        own[section] = section_of(own, section)
        for key in keys:
            _agree(own[section], key, shared[section][key], f"{section}.{key}")
    return own


def first_stage(run: Path) -> OpenState | None:
    """Return the first stage that a run trained itself, ended or not, else the first adapter that
    was added to it; None where there is none."""
    if not exists_in(run):
        return None
    history = read_history(run)
    names = [*history.own_stages, *drafts_in(run, history)]
    names += [entry.key for entry in history.own if entry.has_config]
    return begun_stage(run, names[0], history) if names else None


def _is_same_start(before: str, now: str, begun: OpenState) -> bool:
    """Say whether a run began on what `now` names: at the same place, or of the same links."""
    if is_same_place(before, now, begun.run):
        return True
    try:
        links = load_start(now).links
    except ChainLoRAError:
        return False
    own = begun.at(begun.history.origin).links()
    return len(own) == len(links) and all(map(_is_same_link, own, links))


def _is_same_link(one: Link, two: Link) -> bool:
    first, second = _tensors(one), _tensors(two)
    is_alike = (one.strength, one.scaling) == (two.strength, two.scaling)
    is_alike &= first.keys() == second.keys()
    return is_alike and all(torch.equal(first[name], second[name]) for name in first)


def _tensors(link: Link) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    for name, factors in link.factors.items():
        parts = {part: getattr(factors, part) for part in ("a", "b", "bias")}
        found |= {(name, part): tensor for part, tensor in parts.items() if tensor is not None}
    return found


def _agree(own: dict[str, Any], key: str, value: Any, name: str) -> None:
    if own.setdefault(key, value) != value:
        raise ConfigError(
            f"`{name}` must equal the value in the `start` run",
            f"{own[key]!r:.60}, and {value!r:.60} there",
            "leave it out",
        )
