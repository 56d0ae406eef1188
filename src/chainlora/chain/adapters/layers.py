"""Attach a LoRA to a model, read it, write it and remove it, always in place.

`isinstance` tells whether a layer is adapted; names are never matched by substring.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chainlora.chain.adapters.layer_facts import is_linear
from chainlora.chain.adapters.targets import check_targets, peft_config, task_type
from chainlora.chain.link import Factors
from chainlora.config.schema import LinkConfig

CARRIED = "carried"  # PEFT adapter with a chain's earlier links
LIVE = "default"  # PEFT adapter of the live link; PEFT's default name, which TRL expects


@dataclass
class Adapter:
    """A LoRA on a model."""

    tuner: peft.LoraModel  # PEFT's wrapper of the model
    config: LinkConfig
    layers: dict[str, Any]  # PEFT's LoraLayer by module path; its attributes are untyped
    branch: dict[str, Any] = field(default_factory=dict)  # layers with a frozen branch, by path
    # the parameters that were trainable before it was attached
    trainable: list[nn.Parameter] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Adapter: rank {self.config.rank} on {len(self.layers)} modules>"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained parameters."""
        for layer in self.layers.values():
            yield from _parameters(layer)

    def named_factor(self, factor: str) -> list[nn.Parameter]:
        """Return the trained parameters of factor A, or of B with its bias."""
        layers = self.layers.values()
        if factor == "A":
            return [factors_in(layer, LIVE).a for layer in layers]
        return [parameter for layer in layers for parameter in _parameters(layer)[1:]]


class FactorsIn(NamedTuple):
    """Parameters of an adapter in one LoRA layer: A [rank, in], B [out, rank], B's bias [out]."""

    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None


def factors_in(layer: Any, name: str) -> FactorsIn:
    """Return the parameters of a named adapter in a LoRA layer."""
    b = layer.lora_B[name]
    return FactorsIn(layer.lora_A[name].weight, b.weight, b.bias)


def _parameters(layer: Any, name: str = LIVE) -> list[nn.Parameter]:
    return [p for p in factors_in(layer, name) if p is not None]


def base_layer(layer: nn.Module) -> Any:
    """Return the frozen layer inside a LoRA layer, or the layer itself if it is not adapted."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def linked_layer(model: nn.Module, name: str) -> Any:
    """Return the base layer of a module, or None if the model has no linear layer of that name."""
    try:
        layer = base_layer(model.get_submodule(name))
    except AttributeError:
        return None
    return layer if is_linear(layer) else None


@torch.inference_mode(False)  # parameters made in inference mode cannot be trained
def attach(model: nn.Module, config: LinkConfig) -> Adapter:
    """Attach a fresh LoRA to `model`, in place: factors in float32, all other parameters frozen.

    The caller must set the factors, which have PEFT's own initialization. Raises ModelError if no
    module matches, or a module cannot be adapted (`targets.check_targets`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = sorted(check_targets(model, config))
    with warnings.catch_warnings(action="ignore"):
        keys: dict[str, Any] = {"exclude_modules": None, "task_type": task_type(model)}
        if config.init == "gaussian":  # readers of PEFT's config see it
            keys["init_lora_weights"] = "gaussian"
        tuner = peft.LoraModel(model, peft_config(config, target_modules=targets, **keys), LIVE)
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        # without gradients, it would read the weights of its linear layers and skip their LoRA
        torch.backends.mha.set_fastpath_enabled(False)
    adapter = Adapter(tuner, config, lora_layers(model), trainable=trainable)
    for layer in adapter.layers.values():
        layer.lora_A.float()
        layer.lora_B.float()
        layer.train(layer.get_base_layer().training)  # new layers start in training mode
    train_only(adapter)
    return adapter


def train_only(adapter: Adapter) -> None:
    """Make the LoRA trainable, and freeze all other parameters of its model."""
    for parameter in adapter.tuner.model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)


def detach(adapter: Adapter) -> None:
    """Remove the LoRA in place and restore the plain layers."""
    model = adapter.tuner.model
    adapter.tuner.unload()
    for attribute in ("peft_config", "peft_type"):
        if attribute in vars(model):
            delattr(model, attribute)
    for parameter in adapter.trainable:
        parameter.requires_grad_(True)
    adapter.layers, adapter.branch = {}, {}


def same_shape(adapter: Adapter, config: LinkConfig) -> bool:
    """Return whether the next link can reuse these layers, so that compiled graphs stay valid."""
    return adapter.config.model_copy(update={"alpha": config.alpha, "init": config.init}) == config


def set_factors(adapter: Adapter, name: str, factors: Factors) -> None:
    """Set the factors of one module, in place."""
    _fill(adapter.layers[name], LIVE, factors)


@torch.no_grad()
def _fill(layer: Any, name: str, factors: Factors | None) -> None:
    """Set a named adapter of a layer to factors of up to its rank, or to zero."""
    for parameter in _parameters(layer, name):
        parameter.zero_()
    if factors is not None:
        (a, b, bias), rank = factors_in(layer, name), factors.a.shape[0]
        a[:rank].copy_(factors.a)
        b[:, :rank].copy_(factors.b)
        if bias is not None and factors.bias is not None:
            bias.copy_(factors.bias)


def live_factors(adapter: Adapter, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the parameters A [rank, in] and B [out, rank] of one module, not copies."""
    a, b, _ = factors_in(adapter.layers[name], LIVE)
    return a, b


def copied_factors(layer: Any) -> Factors:
    """Copy the factors of a LoRA layer to float32 on the CPU."""
    a, b, bias = factors_in(layer, LIVE)
    return Factors(host(a), host(b), None if bias is None else host(bias))


def set_config(adapter: Adapter, config: LinkConfig) -> None:
    """Set the scaling and settings of the next link on a reused adapter."""
    for layer in adapter.layers.values():
        layer.scaling[LIVE] = config.scaling
        layer.lora_alpha[LIVE] = config.alpha
    adapter.config = config


def get_dropouts(model: nn.Module) -> dict[str, float]:
    """Return the dropout of each LoRA layer that has one, by path; user code may have set it."""
    modules = {
        name: layer.lora_dropout[LIVE]
        for name, layer in lora_layers(model).items()
        if LIVE in layer.lora_dropout
    }
    return {name: module.p for name, module in modules.items() if isinstance(module, nn.Dropout)}


def set_dropouts(adapter: Adapter, dropouts: Mapping[str, float]) -> None:
    """Set the dropout of LoRA layers that have one."""
    for name in get_dropouts(adapter.tuner.model).keys() & dropouts.keys():
        adapter.layers[name].lora_dropout[LIVE].p = dropouts[name]


def zero(adapter: Adapter) -> None:
    """Set both factors and the bias to zero, in place, so that the adapter adds nothing."""
    for layer in adapter.layers.values():
        _fill(layer, LIVE, None)


def host(tensor: Tensor) -> Tensor:
    """Copy a tensor to float32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of a model with a PEFT LoRA, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# --- the frozen branch of `hold: carried` ---


def carry(adapter: Adapter, stacked: Mapping[str, Factors], room: int = 0) -> None:
    """Set the frozen branch beside the base to a low-rank sum, in place.

    `stacked` has factors of the sum by module path, with scalings in B and the bias; sums of a rank
    below `room` are padded with zeros. The branch keeps its tensors while its rank stays the same.
    """
    rank = max([factors.a.shape[0] for factors in stacked.values()] + [room])
    with_bias = any(factors.bias is not None for factors in stacked.values())
    current = [factors_in(layer, CARRIED) for layer in adapter.branch.values()]
    fits = (
        rank == max((parameters.a.shape[0] for parameters in current), default=0)
        and stacked.keys() <= adapter.branch.keys()
        and (not with_bias or any(parameters.bias is not None for parameters in current))
    )
    if not fits:
        modules = dict.fromkeys([*adapter.layers, *stacked])
        _attach_branch(adapter, list(modules), rank, with_bias)
    for name, layer in adapter.branch.items():
        _fill(layer, CARRIED, stacked.get(name))


def _attach_branch(adapter: Adapter, modules: list[str], rank: int, with_bias: bool) -> None:
    tuner = adapter.tuner
    if CARRIED in tuner.peft_config:
        tuner.delete_adapter(CARRIED)
        adapter.branch = {}
    if not rank:
        return
    tuner.peft_config[CARRIED] = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=modules, lora_bias=with_bias
    )
    with warnings.catch_warnings(action="ignore"):
        tuner.inject_adapter(tuner.model, CARRIED)
        tuner.set_adapter([CARRIED, LIVE])
    adapter.branch = {
        name: layer for name, layer in lora_layers(tuner.model).items() if CARRIED in layer.lora_A
    }
    for layer in adapter.branch.values():
        for parameter in _parameters(layer, CARRIED):
            parameter.data = parameter.data.float()
        layer.scaling[CARRIED] = 1.0
    train_only(adapter)
