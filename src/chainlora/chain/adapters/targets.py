"""Select the modules that a link adapts, and check them.

PEFT's own matching, without modules where a LoRA would have no effect; and the errors for named
modules that cannot be adapted.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import peft
from torch import nn
from transformers import PreTrainedModel

from chainlora.chain.adapters.layer_facts import (
    has_own_forward,
    is_linear,
    kind_of,
    shared_weights,
    sizes,
    stacked_experts,
    tied_head,
    uncalled_modules,
    why_no_lora,
    why_no_lora_by_name,
)
from chainlora.config.schema import LinkConfig
from chainlora.errors import ModelError
from chainlora.models.quantizing import is_packed

log = logging.getLogger(__name__)

_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
    """Return the PEFT config of a link."""
    keys: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "lora_bias": config.lora_bias,
        "target_modules": listed(config.target_modules),
        "exclude_modules": listed(config.exclude_modules),
    }
    return peft.LoraConfig(**keys | overrides)


def listed(value: Sequence[str] | str | None) -> list[str] | str | None:
    """Return module names of a config as PEFT and messages need them: a list, a string or None."""
    return value if value is None or isinstance(value, str) else list(value)


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type of a generative model; None for other models.

    With a classifier's task type PEFT would train the whole head.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    if not model.config.is_encoder_decoder:
        return "CAUSAL_LM"
    # PEFT's model for this task accepts only token ids, so not Whisper's features.
    return "SEQ_2_SEQ_LM" if model.main_input_name == "input_ids" else None


def target_candidates(model: nn.Module) -> list[str]:
    """Return names for `target_modules`: the last path parts of all layers that can be adapted.

    The most frequent name comes first.
    """
    head = tied_head(model)
    linear = (n for n, x in model.named_modules() if is_linear(x) and x is not head)
    counts = Counter(name.rpartition(".")[2] for name in linear)
    return sorted(counts, key=lambda last: (-counts[last], last))


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules that a link would adapt, by path, as PEFT selects them.

    ``all-linear`` selects every Linear and Conv1D layer except the head. It also skips layers where
    a LoRA would have no effect or PEFT has none: layers that the model never calls on text (vision
    towers, weights that are read directly) and names that PEFT treats as stacked experts. Unlike
    PEFT it includes packed linear layers (GPTQ, AWQ).
    """
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    with warnings.catch_warnings(action="ignore"):
        resolved: Any = _maybe_include_all_linear_layers(peft_config(config), model)
    takes_all = str(config.target_modules).lower() == "all-linear"
    if takes_all:
        resolved.target_modules |= {n for n, module in model.named_modules() if is_packed(module)}
    matched = {
        name: module
        for name, module in model.named_modules()
        if name and check_target_module_exists(resolved, name)
    }
    if not takes_all:
        return matched
    skipped = _without_effect(model, matched)
    return {name: module for name, module in matched.items() if name not in skipped}


def _without_effect(model: nn.Module, matched: Mapping[str, nn.Module]) -> set[str]:
    """Return the modules that ``all-linear`` skips, and log them."""
    skipped = stacked_experts(model, matched) | uncalled_modules(model, matched)
    skipped |= {name for name in matched if why_no_lora_by_name(model, name)}
    skipped |= {name for name, module in matched.items() if has_own_forward(module)}
    if skipped:
        kinds = ", ".join(sorted({kind_of(name) for name in skipped}))
        _warn_once(model, f"all-linear leaves out {len(skipped)} layers: {kinds}")
    stacked = {
        kind_of(name)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if stacked:
        text = f"all-linear leaves out stacked parameters: {', '.join(sorted(stacked))}"
        _warn_once(model, text)
    return skipped


def _warn_once(model: nn.Module, text: str) -> None:
    warned = _WARNED.setdefault(model, set())
    if text not in warned:
        warned.add(text)
        log.warning("%s", text)


def is_named(path: str, last: str) -> bool:
    """Return whether a path equals a name or ends in it."""
    return path == last or path.endswith("." + last)


# --- checks ---


def check_targets(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules that a link adapts, by path.

    Raises ModelError if a name matches no module, or a matched module cannot be adapted or merged.
    """
    matched = matched_modules(model, config)
    _check_names(model, config, matched)
    shared = shared_weights(model)
    fused = stacked_experts(model, matched)
    for name, module in matched.items():
        _check_kind(model, name, module)
        _check_weight(model, name, module, shared)
        if name in fused:
            got = f"{name}, which PEFT treats as a projection of experts that share one parameter"
            remedy = "leave it out, or use all-linear"
            raise ModelError("stacked experts cannot be linked", got, remedy)
        _check_settings(config, name, module)
    if idle := _uncalled_target(config, matched, uncalled_modules(model, matched)):
        got = f"{idle}, which it never calls on text: it reads the weight directly, or not at all"
        remedy = f"candidates: {', '.join(target_candidates(model))}"
        raise ModelError("the model must call the adapted layers", got, remedy)
    _warn_of_narrow_layers(model, config, matched)
    return matched


def _warn_of_narrow_layers(
    model: nn.Module, config: LinkConfig, matched: Mapping[str, nn.Module]
) -> None:
    """Log layers whose shorter side is below the rank."""
    narrow = {name: side for name in matched if (side := min(sizes(matched[name]))) < config.rank}
    if narrow:
        first = min(narrow, key=lambda name: narrow[name])
        _warn_once(
            model,
            f"rank {config.rank} is above the shorter side of {len(narrow)} of {len(matched)} "
            f"adapted layers ({narrow[first]} at {first}), which limits the rank of their update; "
            f"rank {max(narrow.values())} is enough for them",
        )


def _check_weight(model: nn.Module, name: str, module: nn.Module, shared: dict[str, str]) -> None:
    """Raise if a module shares its weight with the embedding or another module."""
    if module is tied_head(model):
        raise ModelError(
            "`target_modules` must not name a head that is tied to the embedding (got "
            f"{name}): a merge would change both; exclude it, or untie the weights"
        )
    if name in shared:
        raise ModelError(
            "`target_modules` must not match layers that share their weights (got "
            f"{name} and {shared[name]}): one weight cannot store two different updates; add "
            f"{name.rpartition('.')[2]!r} to exclude_modules"
        )


def _check_names(model: nn.Module, config: LinkConfig, matched: Mapping[str, nn.Module]) -> None:
    """Raise unless every name in `target_modules` matches a module."""
    candidates = ", ".join(target_candidates(model))
    if not matched:
        without = f" without {listed(config.exclude_modules)}" if config.exclude_modules else ""
        got = f"{listed(config.target_modules)}{without}"
        remedy = f"candidates: {candidates}, or all-linear"
        raise ModelError("`target_modules` must match at least one module", got, remedy)
    names = config.target_modules if isinstance(config.target_modules, tuple) else ()
    for target in names:
        if not any(is_named(name, target) for name in matched):
            rule, got = "every name in `target_modules` must match", f"{target!r}, which matches"
            raise ModelError(rule, f"{got} nothing", f"candidates: {candidates}")


def _check_kind(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise unless a layer is a plain linear map for which PEFT has a LoRA."""
    kind = type(module).__name__
    if not is_linear(module):
        remedy = f"candidates: {', '.join(target_candidates(model))}"
        raise ModelError("only Linear and Conv1D layers can be linked", f"{kind} at {name}", remedy)
    if is_packed(module) and (reason := why_no_lora(module)):
        raise ModelError(
            "PEFT must have a LoRA for each layer",
            f"{kind} at {name}: {reason}",
            "install the packages it needs (GPTQ and AWQ: gptqmodel and optimum), or use the "
            "checkpoint from before quantisation with quantize: nf4",
        )
    if has_own_forward(module):
        rule = "only layers that compute x Wᵀ + c can be linked"
        got = f"{kind} at {name} with another function"
        raise ModelError(rule, got, "leave it out, or use all-linear")
    if reason := why_no_lora_by_name(model, name):
        raise ModelError(f"PEFT must have a LoRA for each layer (got {name}: {reason})")


def _check_settings(config: LinkConfig, name: str, module: Any) -> None:
    """Raise if a layer cannot support the initialization or bias of a link."""
    shorter = min(sizes(module))
    if config.init == "gradient" and config.rank > shorter:
        rule = "`init: gradient` needs a rank of at most the shorter side of each layer"
        got = f"rank {config.rank} for {shorter} at {name}"
        raise ModelError(rule, got, "lower the rank or use init: kaiming")
    if config.lora_bias and getattr(module, "bias", None) is None:
        rule = "`lora_bias` needs adapted layers with a bias"
        raise ModelError(rule, f"{name} without one", "set lora_bias: false")


def _uncalled_target(
    config: LinkConfig, matched: Mapping[str, nn.Module], uncalled: set[str]
) -> str | None:
    """Return a match of the first target whose matches the model never calls, or None."""
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ("",):
        of_target = [name for name in matched if not target or is_named(name, target)]
        if of_target and uncalled.issuperset(of_target):
            return of_target[0]
    return None
