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
    otherwise, extra modules that the config names, finite numbers. With a model: sizes that fit
    its layers.
    """
    faults = (_module_fault(link, name, model) for name in link.factors)
    extras = (_extra_fault(link, path, model) for path in link.extra)
    return next(filter(None, (*faults, *extras)), None)


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


def _extra_fault(link: Link, path: str, model: nn.Module | None) -> str | None:
    weight = link.extra[path]
    if not adapters.is_extra(path, link.config):
        return f"weights at {path}, which the link did not train"
    if not torch.isfinite(weight).all():
        return f"numbers that are not finite at {path}"
    return None if model is None else _value_fault(model, path, weight)


def check_apart(adapted: set[str], whole: set[str], model: nn.Module, config: LinkConfig) -> None:
    """Raise ChainError for a link that trains whole what others adapt, or the other way round.

    One of the two would be lost at the next knot. `adapted` and `whole` are the modules of others.
    """
    both = adapted & adapters.inside(model, config.extra_modules)
    if whole:
        both |= whole & adapters.matched_modules(model, config).keys()
    if both:
        raise ChainError(
            "all links of a chain adapt a module, or all that touch it train it whole",
            f"both for {min(both)}",
            "leave it out of this link, by exclude_modules or extra_modules",
        )


def check_deposits(state: Mapping[str, Tensor], num_soft_knots: int) -> None:
    """Raise ChainError unless a live link's state has deposits where it had soft knots."""
    has_some = any(name.startswith("deposit/") for name in state)
    if has_some != (num_soft_knots > 0):
        raise ChainError(
            "`num_soft_knots` must be that of the state",
            f"{num_soft_knots} {'with' if has_some else 'without'} deposits",
            "give live_soft_knots of the chain that it is from",
        )


def check_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise ChainError unless values by path fit the parameters of a model."""
    for path, value in values.items():
        if fault := _value_fault(model, path, value):
            raise ChainError(
                f"extra modules must start from weights of this model (got {fault}); take "
                "start_of_extra() of a chain on it"
            )


def _value_fault(model: nn.Module, path: str, value: Tensor) -> str | None:
    """Return why a value is none for a parameter of a model, None where it is one."""
    try:
        wanted = list(model.get_parameter(path).shape)
    except AttributeError:
        return f"weights at {path}, which the model lacks"
    found = list(value.shape)
    return None if found == wanted else f"weights of {found} for {wanted} at {path}"


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
    """Raise ChainError for strengths of what is no sum.

    The last link's extra modules are the model's: such a link is on or off, off only if what builds
    on it is off too.
    """
    for place, link in enumerate(links):
        above = [other for other in links[place + 1 :] if other.strength]
        trained = set(link.config.extra_modules)
        heirs = [other for other in above if trained & set(other.config.extra_modules)]
        if not abs(link.strength) <= _LARGEST_STRENGTH:  # NaN is not within any range
            raise _strength_error(link, f"must be within ±{_LARGEST_STRENGTH:g}", "use 0 to 1")
        if link.strength not in (0, 1) and link.config.extra_modules:
            raise _strength_error(link, "with extra modules must be 0 or 1", "switch it off or on")
        if not link.strength and heirs:
            ids = ", ".join(str(other.id) for other in heirs)
            raise _strength_error(
                link,
                "with extra modules can be 0 only with those above",
                f"switch it on, or {ids} off",
            )


def _strength_error(link: Link, rule: str, remedy: str) -> ChainError:
    return ChainError(
        f"the strength of a link {rule} (got {link.strength:g} for link {link.id}); {remedy}"
    )
