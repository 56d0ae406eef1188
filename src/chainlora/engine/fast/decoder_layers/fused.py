"""Element-wise blocks of a decoder as autograd functions in plain torch operations.

Composed of single operations, autograd runs three times the passes over memory and keeps float32
copies. Each function here writes its gradient out by hand, for frozen weights, and keeps what that
gradient needs and no more. Tensors are rows: [T, width].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``w · x / rms(x)`` for x [T, d], and ``1 / rms(x)`` [T, 1] in float32 (float64 for
    float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = torch.empty_like(x)
    torch.mul(x, inverse, out=out)
    return out.mul_(weight), inverse


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x, with r = 1/rms: ``∂x = r·(w g) − x · r³/d · Σ w g x``.

    Overwrites `grad`.
    """
    scaled = grad.mul_(weight)
    total = (scaled * x).sum(-1, keepdim=True, dtype=inverse.dtype)
    factor = total.mul_(inverse.pow(3)).div_(-x.shape[-1]).to(x.dtype)
    return scaled.mul_(inverse.to(x.dtype)).addcmul_(x, factor)


class RmsNorm(torch.autograd.Function):
    """``w · x / sqrt(mean(x²) + eps)`` over the last dimension, w frozen (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        return normalise_backward(grads[0].clone(), x, weight, inverse), None, None


class Turn(NamedTuple):
    """Tables of a rotation, [T, 1, size]: ``out = x · cos + swapped(x) · sin``, and `back` for the
    gradient."""

    cos: Tensor
    sin: Tensor
    back: Tensor


def make_turn(cos: Tensor, sin: Tensor) -> Turn:
    """Return the tables of a rotation from transformers' cos and sin [T, size], made once for all
    layers."""
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return Turn(cos[:, None], signed[:, None], torch.roll(signed, half, -1)[:, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x · cos + swapped(x) · sin`` for x [T, heads, size]."""
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)


class Rotary(torch.autograd.Function):
    """Rotate the halves of each head by position: ``x · cos + [−x₂, x₁] · sin`` (arXiv 2104.09864).

    x [T, heads, size]; the tables of a `Turn`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(cos, back)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, back = ctx.saved_tensors
        return rotate(grads[0], cos, back), None, None, None
