"""A chain inside PEFT's own model, for loops that know PEFT and nothing of chains.

A `PeftModel` is a shell around a tuner. The LoRA that its owner put on is read (`read_settings`)
and taken off (`take_off`), and what it has learned becomes a link (`read_trained`); the chain puts
its own on the plain model inside, and the shell is given that tuner (`put_in`). Saving and loading,
which the shell would do for one adapter, are redirected (`redirect`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
from torch import nn

from chainlora.chain.adapters.importing import odd_field
from chainlora.chain.adapters.layers import (
    LIVE,
    Adapter,
    copied_factors,
    factors_in,
    lora_layers,
)
from chainlora.chain.link import Factors
from chainlora.errors import ModelError

# TRL's DPOTrainer adds a copy of a fresh adapter under this name, as its reference.
_REFERENCE = "ref"
_INITS = {True: "kaiming", "gaussian": "gaussian"}
_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
}
_REMEDIES = {
    "modules_to_save": "leave it out, and task_type of a classifier, by which PEFT trains its head",
    "init_lora_weights": "leave it out, or set it to 'gaussian'",
}


def read_settings(model: nn.Module) -> dict[str, Any]:
    """Return what a model's LoRA says, by the keys of `LinkConfig`.

    Raises ModelError unless it is a PEFT model with one plain LoRA.
    """
    tuned = _peft_model(model)
    config = tuned.peft_config[LIVE]
    plain = tuned.get_base_model()
    _check_fields(config)
    _check_trained(plain)
    targets = config.target_modules
    if config.exclude_modules or config.layers_to_transform is not None:
        targets = lora_layers(plain)  # PEFT lists all linear layers, also what is excluded
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "rslora": config.use_rslora,
        "lora_bias": config.lora_bias,
        "init": _INITS[config.init_lora_weights],
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets)),
    }


def _peft_model(model: nn.Module) -> Any:
    if not isinstance(model, peft.PeftModel):
        has_lora = bool(lora_layers(model))
        beside = " with an adapter" if has_lora else ", all of whose weights would be tuned"
        raise ModelError(
            f"a chain needs a model of PEFT (got {type(model).__name__}{beside}); wrap it by "
            "peft.get_peft_model, or pass peft_config to a trainer of TRL"
        )
    names = [name for name in model.peft_config if name != _REFERENCE]
    active = model.active_adapters
    if names != [LIVE] or active != [LIVE]:
        remedy = "merge or delete the others" if len(names) > 1 else "leave adapter_name out"
        raise ModelError(
            f"a chain needs one adapter, of PEFT's name {LIVE!r} (got {', '.join(names)}; active: "
            f"{', '.join(active)}); {remedy}"
        )
    if model.peft_config[LIVE].peft_type != peft.PeftType.LORA:
        kind = getattr(model.peft_config[LIVE].peft_type, "value", "another")
        raise ModelError(f"a chain needs a LoRA (got {kind}); use peft.LoraConfig")
    return model


def _check_fields(config: Any) -> None:
    """Refuse every field that would be lost when the next link begins."""
    if config.target_parameters:
        raise ModelError(
            "stacked experts cannot be linked (got PEFT's LoRA on the parameters "
            f"{', '.join(sorted(config.target_parameters)[:3])}, which all-linear includes); name "
            "linear layers in target_modules, such as q_proj and v_proj"
        )
    told = {each.name: getattr(config, each.name) for each in fields(config)}
    odd = odd_field(told, _READ)
    if odd is None and config.init_lora_weights not in _INITS:
        odd = "init_lora_weights", config.init_lora_weights
    if odd is not None:
        remedy = _REMEDIES.get(odd[0], "leave it out")
        raise ModelError(f"a chain needs a plain LoRA (got `{odd[0]}={odd[1]!r:.60}`); {remedy}")


def _check_trained(model: nn.Module) -> None:
    """Refuse a choice of what is trained that links would undo: they train the LoRA, all of it."""
    lora = {p for layer in lora_layers(model).values() for p in factors_in(layer, LIVE)}
    named = dict(model.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    own = {name for name, parameter in named.items() if parameter in lora}
    if trained - own:
        got, remedy = "is trained too", "freeze it"
    elif trained and own - trained:  # an adapter that was loaded to be used is frozen as a whole
        got, remedy = "is frozen", "unfreeze it"
    else:
        return
    rule = "a chain trains the model's LoRA, all of it and nothing else"
    raise ModelError(rule, f"{min(trained ^ own)}, which {got}", remedy)


def read_trained(model: Any) -> dict[str, Factors] | None:
    """Return the factors of a PEFT model's LoRA by module; None of a fresh one, which adds nothing.

    Raises ModelError for one that is merged.
    """
    plain = model.get_base_model()
    layers = lora_layers(plain)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ModelError(
            f"a chain needs an adapter beside the base (got a merged one at {merged[0]}); call "
            "model.unmerge_adapter(), or load both anew"
        )
    factors = {name: copied_factors(layer) for name, layer in layers.items()}
    return factors if any(share.adds for share in factors.values()) else None


def take_off(model: Any) -> nn.Module:
    """Take every LoRA off a PEFT model, in place, and return the plain model inside it."""
    plain: nn.Module = model.get_base_model()
    model.base_model.unload()
    return plain


def put_in(model: Any, adapter: Adapter) -> None:
    """Let a PEFT model hold a chain's LoRA, which sits on its plain model already."""
    model.base_model = adapter.tuner
    model.active_adapter = LIVE


def redirect(
    model: Any,
    save: Callable[[Path], None],
    load: Callable[[Path], None],
    switch_off: Callable[[], None],
) -> None:
    """Have a PEFT model save and load by the functions given, in place.

    Whoever saves it (Trainer, TRL, a push to the Hub) calls ``save_pretrained``; resume and the
    best model come by ``load_adapter``. Adapters of other names are left to PEFT. `switch_off` is
    called before ``disable_adapter``, by which TRL has its reference model.
    """
    redirected = _Redirected(model, save, load, switch_off)
    model.save_pretrained = redirected.save_pretrained
    model.load_adapter = redirected.load_adapter
    model.disable_adapter = redirected.disable_adapter


@dataclass
class _Redirected:
    """The methods that a PEFT model gets. Methods, and not functions, as a copy of the model then
    has its own."""

    model: Any
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    switch_off: Callable[[], None]

    def save_pretrained(
        self, save_directory: str | Path, *_: Any, is_main_process: bool = True, **__: Any
    ) -> None:
        if is_main_process:
            self.save(Path(save_directory))

    def load_adapter(self, model_id: str | Path, adapter_name: str, *rest: Any, **keys: Any) -> Any:
        if adapter_name != LIVE:
            kind = type(self.model)
            return kind.load_adapter(self.model, model_id, adapter_name, *rest, **keys)
        self.load(Path(model_id))
        return None

    def disable_adapter(self) -> Any:
        self.switch_off()
        return type(self.model).disable_adapter(self.model)
