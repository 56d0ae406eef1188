"""Faster forwards of linear layers: with a LoRA, and in bfloat16 on CPUs without a kernel for it.

A LoRA layer becomes one autograd function, ``y = x Wᵀ + c + s · (x Aᵀ) Bᵀ``. Each call checks that
the layer computes exactly this, and otherwise uses PEFT's forward: for other active adapters, a
merged or disabled adapter, dropout, variants of LoRA, a bias on B, autocast, and a base layer that
is trained or not exactly Linear or Conv1D (quantised, sharded, hooked).

On CPUs without a bfloat16 kernel, a bfloat16 layer of the model runs as a float32 matmul that is
rounded once. `engine.matmul` explains why this is the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chainlora.engine.fast_path import FastPath
from chainlora.engine.matmul import is_slow
from chainlora.engine.patching import is_foreign, replacement
from chainlora.engine.probes import Facts
from chainlora_fast.projection import Projection, ProjectionFunction


class Bfloat16Linears(FastPath):
    """Computes slow bfloat16 Linear and Conv1D layers in float32."""

    name = "bfloat16 matmuls by float32"

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        return None if any(_slow_layers(model)) else "no layer needs it"

    def apply(self, model: nn.Module) -> None:
        self._count = sum(
            self.patches.replace_forward(layer, _wide_forward) for layer in _slow_layers(model)
        )

    def note(self, reason: str | None) -> str | None:
        if reason is not None:
            return None
        return f"{self.name}: yes, in {self._count} layers; this CPU has no bfloat16 kernel"


def _slow_layers(model: nn.Module) -> Iterator[nn.Module]:
    layers: Iterator[Any] = (m for m in model.modules() if type(m) in (nn.Linear, Conv1D))
    return (layer for layer in layers if is_slow(layer.weight))


@replacement
def _wide_forward(layer: Any, x: Tensor) -> Tensor:
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    slow = is_slow(x) and is_slow(layer.weight)
    if trained or not slow or torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x)
    weight = layer.weight.T if type(layer) is Conv1D else layer.weight
    return ProjectionFunction.apply(x, *Projection(weight, layer.bias))


class LoraLayers(FastPath):
    """Uses the fused forward for LoRA layers, which are attached after the probe."""

    name = "LoRA layers"

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        return None  # each call checks that it is the same function

    def note(self, reason: str | None) -> str | None:
        return None  # the model has no LoRA yet

    def adapt(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            self.patches.replace_forward(layer, _lora_forward)


def is_lora_layer(module: nn.Module) -> bool:
    """Return whether the module is a LoRA layer over a linear layer."""
    return all(
        hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "active_adapters")
    )


@replacement
def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = args or kwargs or torch.is_autocast_enabled(x.device.type)
    projection = None if plain else projection_of(layer)
    if projection is None or x.dtype != projection.weight.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    return ProjectionFunction.apply(x, *projection)


def projection_of(layer: Any) -> Projection | None:
    """Return the projection that a LoRA layer computes, or None if PEFT's forward must run."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    (name,) = active
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    is_plain = (
        type(base) in (nn.Linear, Conv1D)
        and type(a) is nn.Linear
        and type(b) is nn.Linear
        and a.bias is None
        and b.bias is None
        and (type(layer.lora_dropout[name]) is nn.Identity or not layer.training)
        and name not in getattr(layer, "lora_variant", ())
        and not any(m._forward_hooks or m._forward_pre_hooks or is_foreign(m) for m in (base, a, b))
    )
    if not is_plain or any(w is not None and w.requires_grad for w in (base.weight, base.bias)):
        return None
    weights = (base.weight, a.weight, b.weight)
    # plain floating-point tensors: not sharded, not quantised
    if not all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() for w in weights):
        return None
    weight = base.weight.T if type(base) is Conv1D else base.weight
    return Projection(weight, base.bias, a.weight, b.weight, layer.scaling[name])
