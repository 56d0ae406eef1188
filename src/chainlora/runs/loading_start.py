"""Load the start of a chain: a finished run, a saved chain, or a LoRA that PEFT has saved.

`load_start` reads the `Start` without a model. `check_start` checks a start against a model, and
`put_on` also adds its links. `load_chain` does all of this for Python callers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn

from chainlora.chain.adapters import MERGE, Imported, import_adapter, linked_layer
from chainlora.chain.chain import Chain
from chainlora.chain.holding import hold_for
from chainlora.chain.link import Link
from chainlora.config.schema import with_flat_model
from chainlora.data.kept import Kept
from chainlora.errors import ConfigError, ModelError, RunError
from chainlora.models.finding import folder_of, from_hub, hub_id_of, name_of
from chainlora.models.identity import base_files, has_tokenizer, need_own_files, tokenizer_files
from chainlora.runs.addresses import begun_stage, nothing_at, open_run
from chainlora.runs.cards import is_hub_id
from chainlora.runs.history_file import read_history
from chainlora.runs.opening import check_base
from chainlora.runs.paths import HISTORY, exists_in, is_run, refuse_older
from chainlora.runs.saved_chain import chain_folder, restore_chain
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The state or adapter that a stage begins on; by default the base alone."""

    state: OpenState | None = None  # of the same run, another run or a saved chain
    links: tuple[Link, ...] = ()
    adapter: Imported | None = None  # whose base is known only by its name
    tokenizer: Path | None = None  # folder of another tokenizer than the base's

    @property
    def kept(self) -> dict[str, Kept]:
        """Return the kept rows of earlier stages, by stage in their order."""
        return {} if self.state is None else self.state.kept()

    @property
    def stages(self) -> list[str]:
        """Return the names of earlier stages; a new stage cannot have one of them."""
        return [] if self.state is None else [entry.key for entry in self.state.lineage]


NOTHING = Start()  # the base alone


def load_start(source: str | Path) -> Start:
    """Read a start: ``RUN`` or ``RUN@STAGE``, a saved chain, or a LoRA by its folder or Hub id.

    A trainer's checkpoint has a saved chain inside. Raises RunError for another, unfinished or
    damaged source, and ChainLoRAError for an adapter that cannot become links.
    """
    if is_run(source):
        state = open_run(source)
        if state.draft is not None:
            rule = "a chain starts from a finished run"
            raise RunError(rule, state.run, "finish it: repeat the command that began it")
        return start_at(state)
    folder = start_folder(source)
    refuse_older(folder)
    tokenizer = folder if has_tokenizer(folder) else None
    inside = chain_folder(folder)
    if exists_in(inside):
        start = start_at(open_run(inside))
        return replace(start, tokenizer=tokenizer or start.tokenizer)
    if (folder / "adapter_config.json").is_file():
        adapter = import_adapter(folder)
        link = Link(0, adapter.config, adapter.factors)
        return Start(links=(link,), adapter=adapter, tokenizer=tokenizer)
    raise RunError(
        "a chain starts from a run, a saved chain or an adapter",
        f"no {HISTORY} and no adapter_config.json in {folder}",
        "name another folder, or give a whole model as the model",
    )


def start_folder(source: str | Path) -> Path:
    """Return the folder of a source; a Hub id is downloaded.

    Raises RunError if it is not found, ModelError if its files are links out of it.
    """
    folder = Path(expanduser(source))
    if not folder.exists():
        try:
            folder = from_hub(str(source))
        except ModelError as error:
            raise nothing_at(source, "adapter") from error
    need_own_files(folder, [*tokenizer_files(folder), *folder.glob("adapter_*")])
    return folder


def start_at(state: OpenState) -> Start:
    """Return the start at a state, with its links read."""
    return Start(state=state, links=tuple(state.links()), tokenizer=state.tokenizer())


def check_start(start: Start, chain: Chain, name: str | None = None) -> None:
    """Check a start against the model of a chain; warn if the model may be another.

    `name` is the name of the model; by default its own. Raises ModelError or RunError for another
    model than the links were tuned on.
    """
    if start.adapter is not None:
        _check_fit(start.adapter, chain.model)
        model_name = name_of(chain.model)
        _tell_other_name(start.adapter, name or hub_id_of(model_name) or model_name)
    elif start.state is not None:
        base, folder = start.state.base, folder_of(chain.model)
        files = base_files(folder) if folder and base.files is not None else None
        check_base(base, "the earlier stage", files=files, chain=chain)


def put_on(start: Start, chain: Chain) -> None:
    """Add the links of a start, checked by `check_start`, to a chain without links."""
    check_start(start, chain)
    chain.add(*start.links)


def load_chain(
    directory: str | Path, model: nn.Module, *, checkpoint: str | Path | None = None
) -> Chain:
    """Return a chain on the model that it was tuned on.

    Args:
        directory: a saved chain, whose live link continues to the same bits; a trainer's
            checkpoint; a finished run or ``RUN@STAGE``; or the folder or Hub id of a LoRA that PEFT
            has saved, which becomes one link.
        model: the base model; its links are added in place.
        checkpoint: the folder that the model was loaded from, as for `Chain`; by default the folder
            that the model names, if it exists.

    Returns:
        The chain.

    Raises:
        RunError: a damaged folder, an unfinished run, or another base than that of the chain.
        ModelError: an adapter for another model.
    """
    weights = checkpoint or folder_of(model)
    address = directory if is_run(directory) else chain_folder(Path(expanduser(directory)))
    state = open_run(address) if is_run(address) else None
    seed, hold = 0, hold_for(model)
    if state is not None:
        seed, hold = state.history.seed, state.history.hold
    chain = Chain(model, seed=seed, hold=hold, checkpoint=weights)
    if state is not None and not state.has_run:
        restore_chain(chain, state)
    else:
        put_on(load_start(directory), chain)
    return chain


def _check_fit(adapter: Imported, model: nn.Module) -> None:
    """Raise ModelError unless a model has the layers of an adapter, and its saved embeddings."""
    need_layers(adapter, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, weight in adapter.kept.items():
        own = parameters.get(path, torch.empty(0)).detach().cpu()
        # in the narrower of their dtypes
        if not torch.equal(own.to(weight.dtype).to(own.dtype), weight.to(own.dtype)):
            raise ModelError(
                "an adapter and its base must have the same vocabulary",
                f"{weight.shape[0]} rows for {own.shape[0]}, or other values, at {path}",
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


def _tell_other_name(adapter: Imported, name: str) -> None:
    """Warn if a model has another name than the base of an adapter, which may have a revision.

    Folders are compared by the last part of their path.
    """
    if revision := adapter.stored.get("revision"):
        logger.warning("the adapter is for revision %s of its base", revision)
    names = [adapter.base, name]
    if not all(map(is_hub_id, names)):
        names = [PureWindowsPath(path).name for path in names]  # accepts / and \ as separators
    if all(names) and names[0] != names[1]:
        told = "the adapter is for another base, %s, than %s; their shapes agree, but "
        logger.warning(f"{told}their outputs may differ", adapter.base, name)


def with_begun(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config; without `stages`, its stage has the name of that of the run in `output`.

    Raises ConfigError for `start`, which only configs of added adapters have.
    """
    try:
        config = with_flat_model(tree)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.get("start") is not None:
        rule = "`start` is no key of a config"
        remedy = "chainlora add RUN ADAPTER --rows FILE takes an adapter, chainlora extend "
        remedy += "RUN@STAGE FILE --output FORK a state of a run"
        raise ConfigError(rule, f"{config['start']!r:.60}", remedy)
    begun = first_stage(Path(expanduser(str(config.get("output")))))
    if begun is not None:
        config.setdefault("stages", [{"name": begun.key}])
    return config


def first_stage(run: Path) -> OpenState | None:
    """Return the stage that a run began first, or else the first added adapter, or None."""
    if not exists_in(run):
        return None
    history = read_history(run)
    stages = sorted(history.plan().stages, key=lambda stage: stage.kind == "import")
    begun = (begun_stage(run, stage.name, history) for stage in stages)
    return next((state for state in begun if state is not None), None)
