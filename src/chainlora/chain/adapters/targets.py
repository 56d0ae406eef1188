"""Which modules a link adapts: PEFT's own matching, less what a LoRA would do nothing on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import peft
from torch import nn
from transformers import PreTrainedModel

from chainlora.chain.adapters.layer_facts import (
    has_own_forward,
    is_linear,
    kind_of,
    stacked_experts,
    tied_pair,
    uncalled_modules,
    why_no_lora_by_name,
)
from chainlora.config.schema import LinkConfig
from chainlora.models.quantizing import is_packed

log = logging.getLogger(__name__)

_SAID: WeakSet[nn.Module] = WeakSet()

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
    """Return PEFT's config of a link."""
    keys: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "target_modules": listed(config.target_modules),
        "exclude_modules": listed(config.exclude_modules),
        "modules_to_save": list(config.extra_modules) or None,
    }
    return peft.LoraConfig(**keys | overrides)


def listed(value: Sequence[str] | str | None) -> list[str] | str | None:
    """Return the names of a config's key as PEFT takes them and messages show them."""
    return value if value is None or isinstance(value, str) else list(value)


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of what a model is for, None where it has none."""
    name = type(model).__name__
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task
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
    head, _ = tied_pair(model)
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            last = name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    return sorted(counts, key=lambda last: (-counts[last], last))


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules a link would adapt, by path, as PEFT itself picks them.

    What `extra_modules` trains whole is not adapted as well.

    ``all-linear`` is every Linear and Conv1D layer but the head, and but those where a LoRA would
    do nothing or PEFT has none: layers that the model never calls on text (vision towers, weights
    that are read directly), and names that PEFT takes for stacked experts. Linear layers that show
    no weight (GPTQ, AWQ) count among them, which PEFT itself leaves out.
    """
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved: Any = _maybe_include_all_linear_layers(peft_config(config), model)
    takes_all = str(config.target_modules).lower() == "all-linear"
    if takes_all:
        resolved.target_modules |= {n for n, module in model.named_modules() if is_packed(module)}
    trained_whole = inside(model, config.extra_modules)
    matched = {
        name: module
        for name, module in model.named_modules()
        if name and name not in trained_whole and check_target_module_exists(resolved, name)
    }
    if not takes_all:
        return matched
    left_out = stacked_experts(model, matched) | uncalled_modules(model, matched)
    left_out |= {name for name in matched if why_no_lora_by_name(model, name)}
    left_out |= {name for name, module in matched.items() if has_own_forward(module)}
    _say(model, left_out)
    return {name: module for name, module in matched.items() if name not in left_out}


def _say(model: nn.Module, left_out: set[str]) -> None:
    """Log once a model which layers a link on all of them does without."""
    if model in _SAID:
        return
    _SAID.add(model)
    if left_out:
        kinds = sorted({kind_of(name) for name in left_out})
        log.warning("all-linear leaves out %d layers: %s", len(left_out), ", ".join(kinds))
    stacked = {
        kind_of(name)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if stacked:
        log.warning("all-linear leaves out stacked parameters: %s", ", ".join(sorted(stacked)))


def named_modules(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of all modules whose path is, or ends in, one of `names`."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(is_named(path, name) for name in names)
    ]


def trained_module(path: str, config: LinkConfig) -> str:
    """Return the extra module that a parameter belongs to, by path; it may lie deep inside.

    What PEFT trains because its path ends like another's (`pre_classifier`, `classifier`) is a
    module of its own.
    """
    parts = path.split(".")[:-1]
    for size in range(1, len(parts) + 1):
        module = ".".join(parts[:size])
        if any(is_named(module, name) for name in config.extra_modules):
            return module
    return ".".join(parts)


def is_extra(path: str, config: LinkConfig) -> bool:
    """Say whether a parameter belongs to a module that the config trains whole."""
    module = trained_module(path, config)
    return any(is_named(module, name) for name in config.extra_modules)


def inside(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Return the paths of the modules that `named_modules` finds, and of all within them."""
    return {
        f"{path}.{below}".rstrip(".")
        for path, module in named_modules(model, names)
        for below, _ in module.named_modules()
    }


def is_named(path: str, last: str) -> bool:
    """Say whether a path is, or ends in, a name."""
    return path == last or path.endswith("." + last)
