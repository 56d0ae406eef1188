"""Which modules a link adapts: PEFT's own matching, and every refusal a chain needs on top of
it."""

from __future__ import annotations

import warnings
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from chainlora.config.schema import LinkConfig
from chainlora.errors import ModelError


def peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
    """Return PEFT's config of a link."""
    keys: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "target_modules": _listed(config.target_modules),
        "exclude_modules": _listed(config.exclude_modules),
        "modules_to_save": list(config.extra_modules) or None,
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**keys | overrides)


def _listed(value: tuple[str, ...] | str | None) -> list[str] | str | None:
    return list(value) if isinstance(value, tuple) else value


def target_candidates(model: nn.Module) -> list[str]:
    """Return the last path parts of all Linear and Conv1D layers, most frequent first, for
    `target_modules`."""
    counts: dict[str, int] = {}
    head, _ = _tied(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            last = name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    return sorted(counts, key=lambda last: (-counts[last], last))


def check_targets(model: nn.Module, config: LinkConfig) -> None:
    """Raise ModelError if a link's modules match nothing, or what they match cannot be linked and
    merged."""
    matched = matched_modules(model, config)
    if not matched:
        without = f" without {_listed(config.exclude_modules)}" if config.exclude_modules else ""
        raise ModelError(
            "`target_modules` must match at least one module "
            f"(got {_listed(config.target_modules)}{without}); candidates: "
            f"{', '.join(target_candidates(model))}, or all-linear"
        )
    head, embedding = _tied(model)
    for name, module in matched.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"only Linear and Conv1D layers can be linked (got {type(module).__name__} at "
                f"{name}); "
                f"candidates: {', '.join(target_candidates(model))}"
            )
        if not module.weight.is_floating_point():
            raise ModelError(
                f"a quantised layer cannot be linked yet (got {type(module).__name__} of "
                f"{module.weight.dtype} at "
                f"{name}); load the model in float32 or bfloat16"
            )
        if module is head:
            raise ModelError(
                "`target_modules` must not name a head tied to the input embedding (got "
                f"{name}): its "
                "merge would change the embedding too; exclude it, or untie the weights"
            )
        if config.init in ("gradient", "pissa") and config.rank > min(module.weight.shape):
            raise ModelError(
                f"`init: {config.init}` takes singular directions, of which a layer has as many "
                "as its shorter side "
                f"(got rank {config.rank} for {min(module.weight.shape)} at {name}); lower the "
                "rank or use "
                "init: kaiming"
            )
        if config.lora_bias and module.bias is None:
            raise ModelError(
                f"`lora_bias` needs a bias in the layer it is merged into (got {name} without "
                "one); "
                "set lora_bias: false"
            )
    if isinstance(config.target_modules, tuple):
        unmatched = [
            t for t in config.target_modules if not any(_named(name, t) for name in matched)
        ]
        if unmatched:
            raise ModelError(
                f"every name in `target_modules` must match (got {unmatched[0]!r}, which matches "
                f"nothing); candidates: {', '.join(target_candidates(model))}"
            )
    for extra in config.extra_modules:
        found = named_modules(model, (extra,))
        if not found:
            known = dict.fromkeys(
                name.rpartition(".")[2] for name, _ in model.named_modules() if name
            )
            named = ", ".join(name for name in known if not name.isdigit())
            raise ModelError(
                f"`extra_modules` must match a module (got {extra!r}, which matches nothing); "
                f"known: {named}"
            )
        if any(module in (head, embedding) for _, module in found):
            raise ModelError(
                f"`extra_modules` must not name a tied head or embedding (got {extra!r}): "
                "training one "
                "would change the other; untie the weights first"
            )


def named_modules(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of all modules whose path is, or ends in, one of `names`."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(_named(path, name) for name in names)
    ]


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules a link would adapt, by path, as PEFT itself picks them (for `all-linear`:
    not the head)."""
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved = _maybe_include_all_linear_layers(peft_config(config), model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and check_target_module_exists(resolved, name)
    }


def _named(path: str, last: str) -> bool:
    return path == last or path.endswith("." + last)


def _tied(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Return (head, embedding) when they share one weight, else (None, None)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None, None
    return head, embedding
