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
from torch.nn import functional as F

from chainlora.engine.bf16_matmul import add_product_, linear, product


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``w · x / rms(x)`` and ``1 / rms(x)`` [T, 1] in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = torch.empty_like(x)
    torch.mul(x, inverse, out=out)
    return out.mul_(weight), inverse


def _normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """With r = 1/rms: ``∂x = r·(w g) − x · r³/d · Σ w g x``. Overwrites `grad`."""
    scaled = grad.mul_(weight)
    total = (scaled * x).sum(-1, keepdim=True, dtype=inverse.dtype)
    factor = total.mul_(inverse.pow(3)).div_(-x.shape[-1]).to(x.dtype)
    return scaled.mul_(inverse.to(x.dtype)).addcmul_(x, factor)


class RmsNorm(torch.autograd.Function):
    """``w · x / sqrt(mean(x²) + eps)`` over the last dimension, w frozen (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        return _normalise_backward(grads[0].clone(), x, weight, inverse), None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate) · up`` (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        active = F.silu(gate)
        ctx.save_for_backward(gate, up, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, active = ctx.saved_tensors
        grad = grads[0]
        return torch.ops.aten.silu_backward(grad * up, gate), grad * active


class MlpBlock(torch.autograd.Function):
    """``x + D(silu(G n) · U n)`` with ``n = rmsnorm(x)``; G, U (inner × d), D (d × inner) frozen,
    no biases."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        normed, inverse = _normalise(x, norm, eps)
        gated, upped = linear(normed, gate), linear(normed, up)
        active = F.silu(gated)
        ctx.save_for_backward(x, norm, inverse, gate, up, down, gated, upped, active)
        return linear(active * upped, down).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, gate, up, down, gated, upped, active = ctx.saved_tensors
        inner = product(grads[0], down)
        grad_up = inner * active
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(upped), gated)
        grad = add_product_(product(grad_gate, gate), grad_up, up)
        return (
            _normalise_backward(grad, x, norm, inverse).add_(grads[0]),
            None,
            None,
            None,
            None,
            None,
        )


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


class Rotary(torch.autograd.Function):
    """Rotate the halves of each head by position: ``x · cos + [−x₂, x₁] · sin`` (arXiv 2104.09864).

    x [T, heads, size]; the tables of a `Turn`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(cos, back)
        return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, back = ctx.saved_tensors
        grad = grads[0]
        return (
            torch.addcmul(grad * cos, torch.roll(grad, grad.shape[-1] // 2, -1), back),
            None,
            None,
            None,
        )
