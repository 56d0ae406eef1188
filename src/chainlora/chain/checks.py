"""Checks of a chain's models, links and strengths, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError

# A larger strength is a typing error, and would soon exceed the range of float32.
_LARGEST_STRENGTH = 1e6


def check_model(model: Any, checkpoint: str | Path | None) -> None:
    """Raise ChainError for a model that cannot have a chain, or a missing checkpoint folder."""
    if not isinstance(model, nn.Module) or any(p.is_meta for p in model.parameters()):
        remedy = "load it first: AutoModelForCausalLM.from_pretrained(…)"
        raise ChainError("`model` must be a loaded model", shown(model), remedy)
    # Parameters have other names in a wrapper.
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    if hasattr(model, "_orig_mod") or isinstance(model, parallel):
        remedy = "wrap it after chain.extend, e.g. torch.compile(chain.model)"
        raise ChainError("a chain needs the unwrapped model", shown(model), remedy)
    if checkpoint is not None and not Path(checkpoint).expanduser().is_dir():
        remedy = "leave it out if there is no folder"
        raise ChainError("`checkpoint` must be the path of a folder", shown(checkpoint), remedy)
    check_plain(model)


def check_plain(model: nn.Module) -> None:
    """Raise ChainError for a model that already has LoRA layers."""
    if adapters.lora_layers(model):
        remedy = "remove them: chain.detach(), or merge_and_unload() of PEFT"
        raise ChainError("a chain needs a model without adapters", shown(model), remedy)


def check_config(config: Any) -> None:
    """Raise ChainError unless `config` is a LinkConfig."""
    if not isinstance(config, LinkConfig):
        remedy = "write extend(LinkConfig(rank=8))"
        raise ChainError("`config` must be a LinkConfig", shown(config), remedy)


def shown(value: Any) -> str:
    """Return a value for a message: the repr of a plain value, else the name of its type."""
    if value is None or isinstance(value, str | bytes | bool | int | float | Path):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


# --- links ---


def link_fault(link: Link, model: nn.Module | None = None) -> str | None:
    """Return the first fault of a link's tensors as text, or None.

    Every module needs two factors of the same rank, finite numbers, and a bias if and only if
    `lora_bias` is set. With a `model`, the sizes must also fit its layers.
    """
    faults = (_module_fault(link, name, model) for name in link.factors)
    return next(filter(None, faults), None)


def check_link(link: Link, model: nn.Module) -> None:
    """Raise ChainError for a link that does not fit the model."""
    if fault := link_fault(link, model):
        remedy = "take a link that was tuned on this model"
        raise ChainError("a link must fit the model", fault, remedy)


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
        return f"infinite or NaN values at {name}"
    if model is None:
        return None
    layer = adapters.linked_layer(model, name)
    if layer is None:
        return f"factors for {name}, which the model lacks"
    (inputs, outputs), rows, columns = adapters.sizes(layer), b.shape[0], a.shape[1]
    if (rows, columns) != (outputs, inputs):
        return f"an update of {rows} × {columns} for {outputs} × {inputs} at {name}"
    return None


def check_deposits(state: Mapping[str, Tensor], num_soft_knots: int) -> None:
    """Raise ChainError unless a state has deposits exactly if its link had soft knots."""
    has_deposits = any(name.startswith("deposit/") for name in state)
    if has_deposits != (num_soft_knots > 0):
        got = f"{num_soft_knots} for a state {'with' if has_deposits else 'without'} deposits"
        remedy = "pass live_soft_knots of the chain that saved the state"
        raise ChainError("`num_soft_knots` must match the state", got, remedy)


# --- strengths ---


def with_strengths(links: Sequence[Link], strengths: Mapping[int, float]) -> list[Link]:
    """Return links with new strengths by id. Raises ChainError for an unknown id or a bad value."""
    known = {link.id: link.strength for link in links}
    for link_id in strengths:
        if link_id not in known:
            rule = f"strengths are set by link id, one of {list(known)}"
            raise ChainError(rule, shown(link_id), "see chain.strengths")
    merged = known | {link_id: float(strength) for link_id, strength in strengths.items()}
    changed = [replace(link, strength=merged[link.id]) for link in links]
    check_strengths(changed)
    return changed


def check_strengths(links: Sequence[Link]) -> None:
    """Raise ChainError for strengths that are out of range or NaN."""
    for link in links:
        if not abs(link.strength) <= _LARGEST_STRENGTH:  # also true for NaN
            rule = f"the strength of a link must be within ±{_LARGEST_STRENGTH:g}"
            raise ChainError(rule, f"{link.strength:g} for link {link.id}", "use 0 to 1")
