"""Errors of a chain, raised before anything changes: models, links, strengths that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError

# A strength multiplies a scaling; more than this is a slip, and 1e39 of it is no float32.
_LARGEST_STRENGTH = 1e6


def check_model(model: Any, checkpoint: str | Path | None) -> None:
    """Raise ChainError for a model that no chain can be put on, or a folder that is not there."""
    if not isinstance(model, nn.Module) or any(p.is_meta for p in model.parameters()):
        raise ChainError(
            "`model` must be a loaded model",
            shown(model),
            "load it first: AutoModelForCausalLM.from_pretrained(…)",
        )
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    if hasattr(model, "_orig_mod") or isinstance(model, parallel):  # other names of its parameters
        raise ChainError(
            "a chain needs the model itself",
            shown(model),
            "wrap it after chain.extend, e.g. torch.compile(chain.model)",
        )
    if checkpoint is not None and not Path(checkpoint).expanduser().is_dir():
        raise ChainError(
            "`checkpoint` must be the path of a folder",
            shown(checkpoint),
            "leave it out if the model has none",
        )
    check_plain(model)


def check_plain(model: nn.Module) -> None:
    """Raise ChainError for a model that has LoRA layers already."""
    if adapters.lora_layers(model):
        raise ChainError(
            "a chain needs a model without adapters",
            shown(model),
            "take them off: detach() of its chain, or merge_and_unload() of PEFT",
        )


def check_config(config: Any) -> None:
    """Raise ChainError for what is no config of a link, such as a dict."""
    if not isinstance(config, LinkConfig):
        remedy = "write extend(LinkConfig(rank=8))"
        raise ChainError("`config` must be a LinkConfig", shown(config), remedy)


def shown(value: Any) -> str:
    """Return a plain value as it is written, and another one by its type."""
    if value is None or isinstance(value, str | bytes | bool | int | float | Path):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


# --- links ---


def link_fault(link: Link, model: nn.Module | None = None) -> str | None:
    """Return what is wrong with the tensors of a link, None where nothing is.

    By themselves: two factors of one rank for each module, a bias with `lora_bias` and not
    otherwise, finite numbers. With a model: sizes that fit its layers.
    """
    faults = (_module_fault(link, name, model) for name in link.factors)
    return next(filter(None, faults), None)


def check_link(link: Link, model: nn.Module) -> None:
    """Raise ChainError for a link that does not fit a model."""
    if fault := link_fault(link, model):
        raise ChainError(
            f"a link must fit the model (got {fault}); take a link that was tuned on this model"
        )


def _module_fault(link: Link, name: str, model: nn.Module | None) -> str | None:
    a, b = link.factors[name].a, link.factors[name].b
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == link.rank:
        return f"factors {list(a.shape)} and {list(b.shape)} of rank {link.rank} at {name}"
    bias = link.factors[name].bias
    if bias is None and link.config.lora_bias:
        return f"no bias at {name}"
    if bias is not None and not link.config.lora_bias:
        return f"a bias at {name}, which the link did not train"
    if bias is not None and list(bias.shape) != [b.shape[0]]:
        return f"a bias of {list(bias.shape)} for {b.shape[0]} outputs at {name}"
    if not all(part is None or torch.isfinite(part).all() for part in (a, b, bias)):
        return f"numbers that are not finite at {name}"
    return None if model is None else _misfit(link.factors[name], model, name)


def _misfit(factors: Factors, model: nn.Module, name: str) -> str | None:
    """Return why factors are none of a model's module, None where they fit it."""
    layer = adapters.linked_layer(model, name)
    if layer is None:
        return f"factors for {name}, which the model lacks"
    (inputs, outputs), rows, columns = adapters.sizes(layer), factors.b.shape[0], factors.a.shape[1]
    if (rows, columns) != (outputs, inputs):
        return f"an update of {rows} × {columns} for {outputs} × {inputs} at {name}"
    return None


def check_deposits(state: Mapping[str, Tensor], num_soft_knots: int) -> None:
    """Raise ChainError unless a live link's state has deposits where it had soft knots."""
    has_some = any(name.startswith("deposit/") for name in state)
    if has_some != (num_soft_knots > 0):
        raise ChainError(
            "`num_soft_knots` must be that of the state",
            f"{num_soft_knots} {'with' if has_some else 'without'} deposits",
            "give live_soft_knots of the chain that it is from",
        )


# --- strengths ---


def with_strengths(links: Sequence[Link], strengths: Mapping[int, float]) -> list[Link]:
    """Return links at other strengths, by id. Raises ChainError for those that are refused."""
    known = {link.id: link.strength for link in links}
    for each in strengths:
        if each not in known:
            ids, remedy = list(known), "see chain.strengths"
            raise ChainError(f"strengths are of the links' ids, {ids}", shown(each), remedy)
    now = known | {each: float(strength) for each, strength in strengths.items()}
    changed = [replace(link, strength=now[link.id]) for link in links]
    check_strengths(changed)
    return changed


def check_strengths(links: Sequence[Link]) -> None:
    """Raise ChainError for strengths that no scaling can have."""
    for link in links:
        if not abs(link.strength) <= _LARGEST_STRENGTH:  # NaN is not within any range
            raise ChainError(
                f"the strength of a link must be within ±{_LARGEST_STRENGTH:g}",
                f"{link.strength:g} for link {link.id}",
                "use 0 to 1",
            )
