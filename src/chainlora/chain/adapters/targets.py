"""Which modules a link adapts: PEFT's own matching, less what a LoRA would do nothing on, and why a
module that is named cannot be adapted."""

from __future__ import annotations

import logging
import warnings
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

_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
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
    """Return the names of a config's key as PEFT takes them and messages show them."""
    return value if value is None or isinstance(value, str) else list(value)


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of what a generating model is for; None for other models.

    For a classifier's task PEFT would train its head whole.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    if not model.config.is_encoder_decoder:
        return "CAUSAL_LM"
    # PEFT's model of this task takes token ids and nothing else: not Whisper's
    return "SEQ_2_SEQ_LM" if model.main_input_name == "input_ids" else None


def target_candidates(model: nn.Module) -> list[str]:
    """Return the last path parts of all layers that can be linked, most frequent first, for
    `target_modules`."""
    counts: dict[str, int] = {}
    head = tied_head(model)
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            last = name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    return sorted(counts, key=lambda last: (-counts[last], last))


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules a link would adapt, by path, as PEFT itself picks them.

    ``all-linear`` is every Linear and Conv1D layer but the head, and but those where a LoRA would
    do nothing or PEFT has none: layers that the model never calls on text (vision towers, weights
    that are read directly), and names that PEFT takes for stacked experts. Linear layers that show
    no weight (GPTQ, AWQ) count among them, which PEFT itself leaves out.
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
    left_out = stacked_experts(model, matched) | uncalled_modules(model, matched)
    left_out |= {name for name in matched if why_no_lora_by_name(model, name)}
    left_out |= {name for name, module in matched.items() if has_own_forward(module)}
    if left_out:
        kinds = ", ".join(sorted({kind_of(name) for name in left_out}))
        _warn_once(model, f"all-linear leaves out {len(left_out)} layers: {kinds}")
    stacked = {
        kind_of(name)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if stacked:
        text = f"all-linear leaves out stacked parameters: {', '.join(sorted(stacked))}"
        _warn_once(model, text)
    return {name: module for name, module in matched.items() if name not in left_out}


def _warn_once(model: nn.Module, text: str) -> None:
    said = _SAID.setdefault(model, set())
    if text not in said:
        said.add(text)
        log.warning("%s", text)


def is_named(path: str, last: str) -> bool:
    """Say whether a path is, or ends in, a name."""
    return path == last or path.endswith("." + last)


# --- what is refused ---


def check_targets(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules that a link adapts. Raises ModelError if its names match nothing, or what
    they match cannot be linked and merged."""
    matched = matched_modules(model, config)
    _check_names(model, config, matched)
    head = tied_head(model)
    shared = shared_weights(model)
    fused = stacked_experts(model, matched)
    uncalled = uncalled_modules(model, matched)
    for name, module in matched.items():
        _check_kind(model, name, module)
        if module is head:
            raise ModelError(
                "`target_modules` must not name a head that is tied to the embedding (got "
                f"{name}): its merge would change both; exclude it, or untie the weights"
            )
        if name in shared:
            raise ModelError(
                "`target_modules` must not match layers that share their weights (got "
                f"{name} and {shared[name]}): each would have an update of its own, and one weight "
                f"cannot hold both; add {name.rpartition('.')[2]!r} to exclude_modules"
            )
        if name in fused:
            raise ModelError(
                f"stacked experts cannot be linked (got {name}, which PEFT takes for a projection "
                "of experts that share one parameter); leave it out, or use all-linear"
            )
        _check_settings(config, name, module)
    if idle := _idle_target(config, matched, uncalled):
        raise ModelError(
            f"the model must call the layers that are adapted (got {idle}, whose weight it reads "
            f"directly, or not at all on text); candidates: {', '.join(target_candidates(model))}"
        )
    narrow = {name: side for name in matched if (side := min(sizes(matched[name]))) < config.rank}
    if narrow:
        first = min(narrow, key=lambda name: narrow[name])
        _warn_once(
            model,
            f"rank {config.rank} is above the shorter side of {len(narrow)} of {len(matched)} "
            f"adapted layers ({narrow[first]} at {first}), which bounds the rank of an update; "
            f"rank {max(narrow.values())} suffices for them",
        )
    return matched


def _check_names(model: nn.Module, config: LinkConfig, matched: Mapping[str, nn.Module]) -> None:
    """Raise unless something matches, and every name that is listed does."""
    candidates = ", ".join(target_candidates(model))
    if not matched:
        without = f" without {listed(config.exclude_modules)}" if config.exclude_modules else ""
        raise ModelError(
            "`target_modules` must match at least one module "
            f"(got {listed(config.target_modules)}{without}); candidates: {candidates}, or "
            "all-linear"
        )
    names = config.target_modules if isinstance(config.target_modules, tuple) else ()
    for target in names:
        if not any(is_named(name, target) for name in matched):
            raise ModelError(
                f"every name in `target_modules` must match (got {target!r}, which matches "
                f"nothing); candidates: {candidates}"
            )


def _check_kind(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise unless a layer is a plain linear map that PEFT has a LoRA for."""
    kind = type(module).__name__
    if not is_linear(module):
        raise ModelError(
            f"only Linear and Conv1D layers can be linked (got {kind} at {name}); "
            f"candidates: {', '.join(target_candidates(model))}"
        )
    if is_packed(module) and (reason := why_no_lora(module)):
        raise ModelError(
            f"PEFT must have a LoRA for each layer (got {kind} at {name}: {reason}); install what "
            "PEFT needs for it (GPTQ and AWQ: gptqmodel and optimum), or take the checkpoint "
            "before quantisation, with quantize: nf4"
        )
    if has_own_forward(module):
        raise ModelError(
            f"only layers that compute x Wᵀ + c can be linked (got {kind} at {name}, which "
            "computes something else); leave it out, or use all-linear"
        )
    if reason := why_no_lora_by_name(model, name):
        raise ModelError(f"PEFT must have a LoRA for each layer (got {name}: {reason})")


def _check_settings(config: LinkConfig, name: str, module: Any) -> None:
    """Raise if a link's initialization or bias does not suit a layer."""
    shorter = min(sizes(module))
    if config.init in ("gradient", "pissa") and config.rank > shorter:
        raise ModelError(
            f"`init: {config.init}` takes singular directions, of which a layer has as many as its "
            f"shorter side (got rank {config.rank} for {shorter} at {name}); lower the rank or use "
            "init: kaiming"
        )
    if config.lora_bias and getattr(module, "bias", None) is None:
        raise ModelError(
            f"`lora_bias` needs a bias in the layer it is merged into (got {name} without one); "
            "set lora_bias: false"
        )


def _idle_target(
    config: LinkConfig, matched: Mapping[str, nn.Module], uncalled: set[str]
) -> str | None:
    """Return a module of a target whose matches are none of them called, None if there is none."""
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ("",):
        mine = [name for name in matched if not target or is_named(name, target)]
        if mine and uncalled.issuperset(mine):
            return mine[0]
    return None
