"""A LoRA on a model: put on, read, written, taken off, always in place.

A layer is asked whether it is adapted (`isinstance`), names are never matched by substring.
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

CARRIED = "carried"  # PEFT's name of the branch that holds a chain's earlier links
LIVE = "default"  # the name that PEFT gives, and that its users and TRL expect


@dataclass
class Adapter:
    """A LoRA that sits on the model: its tuner layers by path."""

    tuner: peft.LoraModel
    config: LinkConfig
    layers: dict[str, Any]  # PEFT's LoraLayer, whose attributes are untyped
    branch: dict[str, Any] = field(default_factory=dict)  # layers with a frozen branch beside them
    trainable: list[nn.Parameter] = field(default_factory=list)  # what was so without it

    def __repr__(self) -> str:
        return f"<Adapter: rank {self.config.rank} on {len(self.layers)} modules>"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters this link trains."""
        for layer in self.layers.values():
            yield from _trained(layer)

    def named_factor(self, factor: str) -> list[nn.Parameter]:
        """Return the trained parameters of factor A, or of B with its bias."""
        picked = []
        for layer in self.layers.values():
            a = factors_in(layer, LIVE).a
            picked += [p for p in _trained(layer) if (p is a) == (factor == "A")]
        return picked


class FactorsIn(NamedTuple):
    """The parameters of an adapter in one tuner layer: A [rank, in], B [out, rank], B's bias."""

    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None


def factors_in(layer: Any, name: str) -> FactorsIn:
    """Return an adapter's parameters in a tuner layer."""
    b = layer.lora_B[name]
    return FactorsIn(layer.lora_A[name].weight, b.weight, b.bias)


def _trained(layer: Any) -> Iterator[nn.Parameter]:
    yield from (p for p in factors_in(layer, LIVE) if p is not None)


def base_layer(layer: nn.Module) -> Any:
    """Return the frozen layer below a tuner layer, or the layer itself when it is not adapted."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def linked_layer(model: nn.Module, name: str) -> Any:
    """Return the layer that a link's factors of a name are for, None where there is none."""
    try:
        layer = base_layer(model.get_submodule(name))
    except AttributeError:
        return None
    return layer if is_linear(layer) else None


@torch.inference_mode(False)  # in which nothing is made that can be trained
def attach(model: nn.Module, config: LinkConfig) -> Adapter:
    """Put a fresh LoRA on `model` in place: adapter weights in float32, the rest frozen.

    Factors hold PEFT's own start; the caller sets them. Raises ModelError when nothing matches,
    when a matched layer is neither Linear nor Conv1D, when a target shares its storage
    (tied head), or `lora_bias` finds no bias.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = sorted(check_targets(model, config))
    with warnings.catch_warnings(action="ignore"):
        keys: dict[str, Any] = {"exclude_modules": None, "task_type": task_type(model)}
        if config.init == "gaussian":  # for whoever reads of the tuner what a link is
            keys["init_lora_weights"] = "gaussian"
        tuner = peft.LoraModel(model, peft_config(config, target_modules=targets, **keys), LIVE)
    adapter = Adapter(tuner, config, lora_layers(model), trainable=trainable)
    for layer in adapter.layers.values():
        layer.lora_A.float()
        layer.lora_B.float()
        layer.train(layer.get_base_layer().training)  # no dropout in a model that is evaluated
    train_only(adapter)
    return adapter


def train_only(adapter: Adapter) -> None:
    """Let a LoRA be trained, and nothing else of its model."""
    for parameter in adapter.tuner.model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)


def detach(adapter: Adapter) -> None:
    """Take the LoRA off in place: plain layers again."""
    model = adapter.tuner.model
    adapter.tuner.unload()
    for attribute in ("peft_config", "peft_type"):
        if attribute in vars(model):
            delattr(model, attribute)
    for parameter in adapter.trainable:
        parameter.requires_grad_(True)
    adapter.layers, adapter.branch = {}, {}


def same_shape(adapter: Adapter, config: LinkConfig) -> bool:
    """Say whether the next link fits into this one's tensors (then compiled graphs live on)."""
    return adapter.config.model_copy(update={"alpha": config.alpha, "init": config.init}) == config


@torch.no_grad()
def set_factors(adapter: Adapter, name: str, factors: Factors) -> None:
    """Write one module's factors, in place."""
    layer = adapter.layers[name]
    a, b, bias = factors_in(layer, LIVE)
    a.copy_(factors.a)
    b.copy_(factors.b)
    if bias is not None:
        bias.copy_(torch.zeros(()) if factors.bias is None else factors.bias)


def live_factors(adapter: Adapter, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return one module's A [rank, in] and B [out, rank] themselves, not copies."""
    found = factors_in(adapter.layers[name], LIVE)
    return found.a, found.b


def copied_factors(layer: Any) -> Factors:
    """Copy the factors of a tuner layer to float32 on the CPU."""
    a, b, bias = factors_in(layer, LIVE)
    return Factors(host(a), host(b), None if bias is None else host(bias))


def set_config(adapter: Adapter, config: LinkConfig) -> None:
    """Give a reused adapter the next link's scaling and settings."""
    for layer in adapter.layers.values():
        layer.scaling[LIVE] = config.scaling
        layer.lora_alpha[LIVE] = config.alpha
    adapter.config = config


def get_dropouts(model: nn.Module) -> dict[str, float]:
    """Return the dropout of each tuner layer that has one, by path; an owner may have set it."""
    found = {
        name: layer.lora_dropout[LIVE]
        for name, layer in lora_layers(model).items()
        if LIVE in layer.lora_dropout
    }
    return {name: each.p for name, each in found.items() if isinstance(each, nn.Dropout)}


def set_dropouts(adapter: Adapter, dropouts: Mapping[str, float]) -> None:
    """Set the dropout of tuner layers that have one."""
    for name in get_dropouts(adapter.tuner.model).keys() & dropouts.keys():
        adapter.layers[name].lora_dropout[LIVE].p = dropouts[name]


@torch.no_grad()
def zero(adapter: Adapter) -> None:
    """Make the adapter add nothing: both factors and the bias to zero, in place."""
    for layer in adapter.layers.values():
        for parameter in factors_in(layer, LIVE):
            if parameter is not None:
                parameter.zero_()


def host(tensor: Tensor) -> Tensor:
    """Copy a tensor to float32 on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of a model that a LoRA of PEFT is on, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# --- a low-rank sum beside the base, frozen: how a chain carries its earlier links ---


def carry(adapter: Adapter, stacked: Mapping[str, Factors], room: int = 0) -> None:
    """Hold a low-rank sum beside the base as one frozen branch, in place.

    Scalings are folded into B and the bias. The branch has the rank of the sum, or `room` where
    that is more, and keeps its tensors as long as that rank stays the same.
    """
    rank = max([factors.a.shape[0] for factors in stacked.values()] + [room])
    with_bias = any(factors.bias is not None for factors in stacked.values())
    there = [factors_in(layer, CARRIED) for layer in adapter.branch.values()]
    fits = (
        rank == max((each.a.shape[0] for each in there), default=0)
        and stacked.keys() <= adapter.branch.keys()
        and (not with_bias or any(each.bias is not None for each in there))
    )
    if not fits:
        modules = dict.fromkeys([*adapter.layers, *stacked])
        _put_on_branch(adapter, list(modules), rank, with_bias)
    for name, layer in adapter.branch.items():
        _fill_branch(layer, stacked.get(name))


def _put_on_branch(adapter: Adapter, modules: list[str], rank: int, with_bias: bool) -> None:
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
        for parameter in factors_in(layer, CARRIED):
            if parameter is not None:
                parameter.data = parameter.data.float()
        layer.scaling[CARRIED] = 1.0
    train_only(adapter)


@torch.no_grad()
def _fill_branch(layer: Any, factors: Factors | None) -> None:
    a, b, bias = factors_in(layer, CARRIED)
    for parameter in (a, b, bias):
        if parameter is not None:
            parameter.zero_()
    if factors is None:
        return
    rank = factors.a.shape[0]
    a[:rank].copy_(factors.a)
    b[:, :rank].copy_(factors.b)
    if bias is not None and factors.bias is not None:
        bias.copy_(factors.bias)
