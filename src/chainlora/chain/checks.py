"""What a chain refuses: arguments of another type, links that do not fit, strengths of what is no
sum. Each in one sentence, before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike
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


Holds = Callable[[Any], bool]


def _is(*kinds: type) -> Holds:
    return lambda value: isinstance(value, kinds)


def _or_none(holds: Holds) -> Holds:
    return lambda value: value is None or holds(value)


def _is_loaded(value: Any) -> bool:
    return isinstance(value, nn.Module) and not any(p.is_meta for p in value.parameters())


def _wraps(model: nn.Module) -> bool:
    """Say whether a model is another one under other names, by which nobody could load a link."""
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    return hasattr(model, "_orig_mod") or isinstance(model, parallel)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | LinkConfig)


def _maps_to(holds: Holds) -> Holds:
    return lambda value: isinstance(value, Mapping) and all(map(holds, value.values()))


# Argument → when it is right, what it must be, and what to write instead.
_RULES: dict[str, tuple[Holds, str, str]] = {
    "model": (
        _is_loaded,
        "`model` must be a loaded model",
        "load it first: AutoModelForCausalLM.from_pretrained(…)",
    ),
    "unwrapped": (
        lambda model: not _wraps(model),
        "a chain needs the model itself",
        "wrap it after chain.extend, e.g. torch.compile(chain.model)",
    ),
    "plain": (
        lambda model: not adapters.lora_layers(model),
        "a chain needs a model without adapters",
        "take them off: detach() of its chain, or merge_and_unload() of PEFT",
    ),
    "seed": (_is_count, "`seed` must be a whole number from 0", "e.g. seed=0"),
    "checkpoint": (
        _or_none(lambda value: _is(str, PathLike)(value) and Path(value).expanduser().is_dir()),
        "`checkpoint` must be the path of a folder",
        "leave it out if the model has none",
    ),
    "config": (
        _is(LinkConfig),
        "`config` must be a LinkConfig",
        "write extend(LinkConfig(rank=8))",
    ),
    "configs": (
        lambda value: isinstance(value, list | tuple) and all(map(_is(LinkConfig), value)),
        "`configs` must be a list of LinkConfig",
        "write [LinkConfig(rank=8)] * 3",
    ),
    "backward": (
        _or_none(callable),
        "`backward` must be a function of no arguments",
        "let it run the loss of a few batches, and their backward()",
    ),
    "steps": (_is_list, "`steps` must be iterable", "write range(100), or a list of batches"),
    "steps_of": (
        callable,
        "`steps` must be a function of the link's number",
        "write lambda link: batches",
    ),
    "update": (callable, "`update` must be a function of a step", "let it make an optimizer step"),
    "update_of": (
        callable,
        "`update` must be a function of the link's number",
        "let it make an optimizer, and return the function that makes a step",
    ),
    "share": (
        lambda value: _is_number(value) and 0 <= value < 1,
        "`share` must be in [0, 1)",
        "tie() ties all of the link",
    ),
    "link": (_is(Link), "`link` must be a Link", "take it from tie(), drop() or chain.links"),
    "num_links": (_is_count, "`num_links` must be a whole number from 0", "write drop(1)"),
    "num_steps": (_is_count, "`num_steps` must be a whole number from 0", "e.g. 0"),
    "num_soft_knots": (_is_count, "`num_soft_knots` must be a whole number from 0", "e.g. 0"),
    "tensors": (
        _maps_to(_is(Tensor)),
        "a state must map names to tensors",
        "take it from the chain that was saved",
    ),
    "strengths": (
        _maps_to(_is_number),
        "`strengths` must map ids of links to numbers",
        "write {chain.links[0].id: 0.5}; 0 switches a link off",
    ),
}


def check(**arguments: Any) -> None:
    """Raise ChainError, with what to write instead, for an argument that breaks its rule."""
    for key, value in arguments.items():
        holds, rule, remedy = _RULES[key]
        if not holds(value):
            raise ChainError(rule, shown(value), remedy)


def shown(value: Any) -> str:
    """Return a plain value as it is written, and another one by its type."""
    if value is None or isinstance(value, str | bytes | bool | int | float | Path):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


# --- links ---


def link_fault(link: Link, model: nn.Module | None = None) -> str | None:
    """Return what is wrong with the tensors of a link, None where nothing is.

    By themselves: two factors of one rank for each module, a bias with `lora_bias` and a magnitude
    with `dora` and not otherwise, extra modules that the config names, finite numbers. With a
    model: sizes that fit its layers.
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
    vectors = {
        "bias": (link.factors[name].bias, link.config.lora_bias),
        "magnitude": (link.factors[name].magnitude, link.config.dora),
    }
    for key, (vector, is_due) in vectors.items():
        if vector is None and is_due:
            return f"no {key} at {name}"
        if vector is not None and not is_due:
            return f"a {key} at {name}, which the link did not train"
        if vector is not None and list(vector.shape) != [b.shape[0]]:
            return f"a {key} of {list(vector.shape)} for {b.shape[0]} outputs at {name}"
    if not all(map(_is_finite, (a, b, *(vector for vector, _ in vectors.values())))):
        return f"numbers that are not finite at {name}"
    return None if model is None else misfit(link.factors[name], model, name)


def misfit(factors: Factors, model: nn.Module, name: str) -> str | None:
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
    if not _is_finite(weight):
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


def _is_finite(part: Tensor | None) -> bool:
    return part is None or bool(torch.isfinite(part).all())


# --- strengths ---


def with_strengths(links: Sequence[Link], strengths: Mapping[int, float]) -> list[Link]:
    """Return links at other strengths, by id. Raises ChainError for those that are refused."""
    known = {link.id: link.strength for link in links}
    if unknown := [each for each in strengths if each not in known]:
        raise ChainError(
            f"strengths are of the links' ids, {list(known)} (got {shown(unknown[0])}); see "
            "chain.strengths"
        )
    now = known | {each: float(strength) for each, strength in strengths.items()}
    changed = [replace(link, strength=now[link.id]) for link in links]
    check_strengths(changed)
    return changed


def check_strengths(links: Sequence[Link]) -> None:
    """Raise ChainError for strengths of what is no sum.

    DoRA rescales all that is below it, and the last link's extra modules are the model's: such a
    link is on or off, off only if what builds on it is off too, and nothing below DoRA is weakened.
    """
    for place, link in enumerate(links):
        above = [other for other in links[place + 1 :] if other.strength]
        dora = [other for other in above if other.config.dora]
        trained = set(link.config.extra_modules)
        heirs = [o for o in above if link.config.dora or trained & set(o.config.extra_modules)]
        if not abs(link.strength) <= _LARGEST_STRENGTH:  # NaN is not within any range
            raise _strength_error(link, f"must be within ±{_LARGEST_STRENGTH:g}", "use 0 to 1")
        if link.strength not in (0, 1) and (link.config.dora or link.config.extra_modules):
            what = "DoRA" if link.config.dora else "extra modules"
            raise _strength_error(link, f"with {what} must be 0 or 1", "switch it off or on")
        if not link.strength and heirs:
            ids = ", ".join(str(other.id) for other in heirs)
            raise _strength_error(
                link,
                "with DoRA or extra modules can be 0 only with those above",
                f"switch it on, or {ids} off",
            )
        if link.strength != 1 and dora:
            raise _strength_error(link, "below a DoRA link must be 1", f"switch {dora[0].id} off")


def _strength_error(link: Link, rule: str, remedy: str) -> ChainError:
    return ChainError(
        f"the strength of a link {rule} (got {link.strength:g} for link {link.id}); {remedy}"
    )
