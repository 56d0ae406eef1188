"""The matmuls of this package; of bfloat16 on CPUs that have none of their own, by float32.

A product of two bfloat16 numbers is exact in float32, and hardware sums in float32 too; so results
are the native ones up to the order of a sum. Without AVX-512 torch has no kernel for them but a
plain loop, ten to forty times slower than float32. Everywhere else these are torch's own functions.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def _has_kernels() -> bool:
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def is_slow(x: Tensor) -> bool:
    """Say whether matmuls of this tensor are better done in float32."""
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _has_kernels()


def widened(weight: Tensor) -> Tensor:
    """Return a weight as the functions here multiply by it, to widen it once for many calls."""
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
