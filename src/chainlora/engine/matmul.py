"""Matmuls that compute bfloat16 in float32 on CPUs without a fast bfloat16 kernel.

On CPUs without AVX-512, torch multiplies bfloat16 matrices in a plain loop, ten to forty times
slower than float32. A product of two bfloat16 numbers is exact in float32, and hardware kernels
also add in float32, so the results are equal up to the order of the sum. In all other cases these
functions call torch's own.
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
    """Return whether matmuls of this tensor are faster in float32."""
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _has_kernels()


def widened(weight: Tensor) -> Tensor:
    """Return a weight in the dtype that the matmuls here use, to cast it once for many calls."""
    return weight.float() if is_slow(weight) else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + c`` [..., out] for x [..., in] and W [out, in]."""
    if not is_slow(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product ``a b``."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b


def add_product_(total: Tensor, a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Add ``scaling · a b`` to `total`, in place, and return it."""
    if not is_slow(total):
        return total.addmm_(a, b, alpha=scaling)
    return total.copy_(torch.addmm(total.float(), a.float(), b.float(), alpha=scaling))
