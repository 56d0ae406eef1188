"""Matmuls of bfloat16 on CPUs that have none of their own: by float32, rounded once.

A product of two bfloat16 numbers is exact in float32, and hardware sums in float32 too; so results
are the native ones up to the order of a sum. Without AVX-512 torch has no kernel for them but a
plain loop, ten to forty times slower than float32. Everywhere else these are torch's own functions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from chainlora.engine.patching import Patches, replacement


@cache
def _has_kernels() -> bool:
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def is_slow(x: Tensor) -> bool:
    """Say whether matmuls of this tensor are better done in float32."""
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _has_kernels()


def widened(weight: Tensor) -> Tensor:
    """Return a weight as the functions here multiply by it: once instead of at every call, where it
    is the same."""
    return weight.float() if is_slow(weight) else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + c`` for x (… × in), W (out × in)."""
    if not is_slow(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b`` of two matrices."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b


def add_product_(total: Tensor, a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Add ``scaling · a b`` to `total` in place and return it."""
    if not is_slow(total):
        return total.addmm_(a, b, alpha=scaling)
    return total.copy_(torch.addmm(total.float(), a.float(), b.float(), alpha=scaling))


def accelerate_linears(model: nn.Module, patches: Patches) -> int:
    """Let every Linear and Conv1D of `model` compute so where its own forward is slow, in place;
    return how many."""
    layers: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    slow = [layer for layer in layers if is_slow(layer.weight)]
    return sum(patches.replace_forward(layer, _forward) for layer in slow)


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
