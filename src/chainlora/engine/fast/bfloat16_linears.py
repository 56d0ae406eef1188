"""For CPUs only: a model's own layers in bfloat16, by float32 matmuls that are rounded once.

Taken on CPUs without a kernel for bfloat16 (`engine.matmul` says why this is the same function).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from chainlora.engine.fast.plugin import FastPath
from chainlora.engine.matmul import is_slow, linear, product
from chainlora.engine.patching import replacement
from chainlora.engine.probes import Facts


class Bfloat16Linears(FastPath):
    """Every Linear and Conv1D whose own forward is slow computes in float32."""

    name = "bfloat16 matmuls by float32"

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why there is nothing to do."""
        return None if any(_slow_layers(model)) else "no layer needs it"

    def apply(self, model: nn.Module) -> None:
        """Replace the forward of each such layer."""
        self._count = sum(
            self.patches.replace_forward(layer, _forward) for layer in _slow_layers(model)
        )

    def note(self, reason: str | None) -> str | None:
        """Say nothing where the hardware has what it takes."""
        if reason is not None:
            return None
        return f"{self.name}: yes, in {self._count} layers; this CPU has none of its own"


def _slow_layers(model: nn.Module) -> Iterator[nn.Module]:
    layers: Iterator[Any] = (m for m in model.modules() if type(m) in (nn.Linear, Conv1D))
    return (layer for layer in layers if is_slow(layer.weight))


@replacement
def _forward(layer: Any, x: Tensor) -> Tensor:
    trained = torch.is_grad_enabled() and any(
        parameter.requires_grad for parameter in layer.parameters()
    )
    if (
        trained
        or not is_slow(x)
        or not is_slow(layer.weight)
        or torch.is_autocast_enabled(x.device.type)
    ):
        return type(layer).forward(layer, x)
    weight = layer.weight.T if type(layer) is Conv1D else layer.weight
    return _Linear.apply(x, weight, layer.bias)


class _Linear(torch.autograd.Function):
    """``x Wᵀ + c``, W and c frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return product(grads[0], ctx.saved_tensors[0]), None, None
