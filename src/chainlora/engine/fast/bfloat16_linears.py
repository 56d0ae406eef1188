"""For CPUs only: a model's own layers in bfloat16, by float32 matmuls that are rounded once.

Taken on CPUs without a kernel for bfloat16 (`engine.matmul` says why this is the same function).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chainlora.engine.fast.plugin import FastPath
from chainlora.engine.fast.projection import Projection, ProjectionFunction
from chainlora.engine.matmul import is_slow
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
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    slow = is_slow(x) and is_slow(layer.weight)
    if trained or not slow or torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x)
    weight = layer.weight.T if type(layer) is Conv1D else layer.weight
    return ProjectionFunction.apply(x, *Projection(weight, layer.bias))
