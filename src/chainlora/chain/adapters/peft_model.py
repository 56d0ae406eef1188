"""Put a chain inside a `PeftModel`, for training loops that only support PEFT.

A `PeftModel` wraps a tuner with one LoRA. This module reads the settings of that LoRA
(`read_settings`) and its trained factors, which become a link (`read_trained`), and removes it
(`take_off`). The chain attaches its own LoRA to the plain model, and the `PeftModel` gets the
chain's tuner (`put_in`). Its methods to save and load call the chain (`redirect`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
from torch import nn

from chainlora.chain.adapters.adapter_files import LINK_FIELDS, unknown_field
from chainlora.chain.adapters.layers import LIVE, Adapter, copied_factors, factors_in, lora_layers
from chainlora.chain.link import Factors
from chainlora.errors import ModelError

# TRL's DPOTrainer adds a copy of the fresh adapter with this name, as its reference.
_REFERENCE = "ref"
_INITS = {True: "kaiming", "gaussian": "gaussian"}
_REMEDIES = {
    "modules_to_save": "leave it out, and a classifier's task_type, for which PEFT trains the head",
    "init_lora_weights": "leave it out, or set it to 'gaussian'",
}


def read_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a PeftModel's LoRA, by the keys of `LinkConfig`.

    Raises ModelError unless the model is a PeftModel with one plain LoRA.
    """
    tuned = _peft_model(model)
    config = tuned.peft_config[LIVE]
    plain = tuned.get_base_model()
    _check_fields(config)
    _check_trained(plain)
    targets = config.target_modules
    if config.exclude_modules or config.layers_to_transform is not None:
        targets = lora_layers(plain)  # PEFT also lists excluded layers
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
        kind = "with an adapter" if lora_layers(model) else "without a LoRA"
        remedy = "wrap the model with peft.get_peft_model, or pass peft_config to a trainer of TRL"
        raise ModelError("a chain needs a PeftModel", f"{type(model).__name__} {kind}", remedy)
    names = [name for name in model.peft_config if name != _REFERENCE]
    active = model.active_adapters
    if names != [LIVE] or active != [LIVE]:
        remedy = "merge or delete the others" if len(names) > 1 else "leave adapter_name out"
        got = f"{', '.join(names)}; active: {', '.join(active)}"
        raise ModelError(f"a chain needs one adapter with the name {LIVE!r}", got, remedy)
    if model.peft_config[LIVE].peft_type != peft.PeftType.LORA:
        kind = getattr(model.peft_config[LIVE].peft_type, "value", "another")
        raise ModelError(f"a chain needs a LoRA (got {kind}); use peft.LoraConfig")
    return model


def _check_fields(config: Any) -> None:
    """Refuse config fields that links do not support: the next link would lose them."""
    if config.target_parameters:
        named = ", ".join(sorted(config.target_parameters)[:3])
        got = f"PEFT's LoRA on the parameters {named}, which all-linear includes"
        remedy = "name linear layers in target_modules, such as q_proj and v_proj"
        raise ModelError("stacked experts cannot be linked", got, remedy)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    unknown = unknown_field(values, LINK_FIELDS)
    if unknown is None and config.init_lora_weights not in _INITS:
        unknown = "init_lora_weights", config.init_lora_weights
    if unknown is not None:
        key, value = unknown
        remedy = _REMEDIES.get(key, "leave it out")
        raise ModelError(f"a chain needs a plain LoRA (got `{key}={value!r:.60}`); {remedy}")


def _check_trained(model: nn.Module) -> None:
    """Refuse other trained parameters than the LoRA: links would freeze or unfreeze them."""
    lora = {p for layer in lora_layers(model).values() for p in factors_in(layer, LIVE)}
    named = dict(model.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    of_lora = {name for name, parameter in named.items() if parameter in lora}
    if trained - of_lora:
        got, remedy = "is trained too", "freeze it"
    elif trained and of_lora - trained:  # PEFT freezes an adapter loaded for inference as a whole
        got, remedy = "is frozen", "unfreeze it"
    else:
        return
    rule = "a chain must train all parameters of the LoRA and no others"
    raise ModelError(rule, f"{min(trained ^ of_lora)}, which {got}", remedy)


def read_trained(model: Any) -> dict[str, Factors] | None:
    """Return the factors of a PeftModel's LoRA by module, or None if the LoRA adds nothing."""
    plain = model.get_base_model()
    layers = lora_layers(plain)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        remedy = "call model.unmerge_adapter(), or load base and adapter again"
        raise ModelError(
            "a chain needs an unmerged adapter", f"a merged one at {merged[0]}", remedy
        )
    factors = {name: copied_factors(layer) for name, layer in layers.items()}
    return factors if any(pair.adds for pair in factors.values()) else None


def take_off(model: Any) -> nn.Module:
    """Remove every LoRA of a PeftModel, in place, and return the plain model inside it."""
    plain: nn.Module = model.get_base_model()
    model.base_model.unload()
    return plain


def put_in(model: Any, adapter: Adapter) -> None:
    """Set the tuner of a PeftModel to a chain's LoRA, which is on its plain model already."""
    model.base_model = adapter.tuner
    model.active_adapter = LIVE


def redirect(
    model: Any,
    save: Callable[[Path], None],
    load: Callable[[Path], None],
    switch_off: Callable[[], None],
) -> None:
    """Replace the methods of a PeftModel that save, load and disable its adapter, in place.

    Trainer, TRL and a push to the Hub save with ``save_pretrained``, and load a checkpoint or the
    best model with ``load_adapter``; `save` and `load` get the folder. TRL computes its reference
    inside ``disable_adapter``; `switch_off` is called before. PEFT still handles adapters with
    other names.
    """
    redirected = _Redirected(model, save, load, switch_off)
    model.save_pretrained = redirected.save_pretrained
    model.load_adapter = redirected.load_adapter
    model.disable_adapter = redirected.disable_adapter


@dataclass
class _Redirected:
    """The new methods of a PeftModel; bound methods, so that `deepcopy` rebinds them to a copy."""

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
