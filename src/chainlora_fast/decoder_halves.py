"""The two halves of a decoder layer of Llama's shape, each one autograd function.

The halves add to a row x [T, d]: attention ``o(attend(q(n), k(n), v(n)))`` and MLP
``D(silu(G n) · U n)``, with ``n = rmsnorm(x)``. Projections are frozen, with or without a LoRA
(`projection`). As separate functions, a half needs four times as many calls of Python and autograd,
which dominate the time of short rows.

With `recompute`, a half stores only its input and computes the rest again in backward.

Element-wise parts have hand-written gradients too, for frozen weights: from single operations,
autograd makes three times as many passes over memory and stores float32 copies. Tensors are rows
[T, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chainlora_fast.packed_attention import attend_backward, attend_forward
from chainlora_fast.packed_layout import Layout, Rows
from chainlora_fast.projection import (
    Projection,
    Wanted,
    factor_gradients,
    input_gradient,
    project,
)

Kept = list[Tensor | None]


# --- element-wise parts ---


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``w · x / rms(x)`` [T, d], and ``1 / rms(x)`` [T, 1], float32 or wider."""
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
    """Tables of a rotation, each [T, 1, size]: ``out = x · cos + swapped(x) · sin``."""

    cos: Tensor
    sin: Tensor
    back: Tensor  # in place of `sin` in the gradient


def make_turn(cos: Tensor, sin: Tensor) -> Turn:
    """Return the tables of a rotation from transformers' cos and sin [T, size]."""
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return Turn(cos[:, None], signed[:, None], torch.roll(signed, half, -1)[:, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x · cos + swapped(x) · sin`` for x [T, heads, size]."""
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)


class Rotary(torch.autograd.Function):
    """Rotate x [T, heads, size] by position: ``x · cos + [−x₂, x₁] · sin`` (arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(cos, back)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, back = ctx.saved_tensors
        return rotate(grads[0], cos, back), None, None, None


# --- the halves ---


class Attention(NamedTuple):
    """Weights and layout of the attention half."""

    norm: Tensor  # [d]
    eps: float
    projections: Sequence[Projection]  # q, k, v, o
    scaling: float
    turn: Turn
    layout: Layout
    rows: Rows | None  # positions to compute; None for all

    def forward(self, ctx: Any, x: Tensor, *, keep: bool) -> tuple[Tensor, Kept]:
        q, k, v, o = ctx.parts
        normed, inverse = normalise(x, self.norm, self.eps)
        size = self.turn.cos.shape[-1]
        key, down_k = project(normed, k)
        value, down_v = project(normed, v)
        normed_rows, turn, layout = at_rows(normed, self.turn, self.layout, self.rows)
        query, down_q = project(normed_rows, q)
        query = rotate(query.view(query.shape[0], -1, size), turn.cos, turn.sin)
        key = rotate(key.view(key.shape[0], -1, size), self.turn.cos, self.turn.sin)
        value = value.view(value.shape[0], -1, size)
        mixed, probabilities = attend_forward(query, key, value, layout, self.scaling, keep=keep)
        mixed = mixed.flatten(1)
        out, down_o = project(mixed, o)
        out.add_(x if self.rows is None else x.index_select(0, self.rows.index))
        downs = [down_q, down_k, down_v, down_o]
        return out, [normed, inverse, query, key, value, mixed, *downs, *probabilities]

    def backward(self, ctx: Any, grad: Tensor, x: Tensor, kept: list[Any]) -> list[Tensor | None]:
        (q, k, v, o), wanted, needs_x = ctx.parts, ctx.wanted, ctx.needs_input_grad[0]
        normed, inverse, query, key, value, mixed, *rest = kept
        downs, probabilities = rest[:4], rest[4:]
        normed_rows, turn, layout = at_rows(normed, self.turn, self.layout, self.rows)
        up_o, *of_o = factor_gradients(grad, mixed, downs[3], o, wanted[3], True)
        grad_mixed = input_gradient(None, grad, up_o, o).view(query.shape[:2] + value.shape[2:])
        grad_q, grad_k, grad_v = attend_backward(
            grad_mixed, query, key, value, probabilities, layout, self.scaling
        )
        grad_q = rotate(grad_q, turn.cos, turn.back).flatten(1)
        grad_k, grad_v = rotate(grad_k, self.turn.cos, self.turn.back).flatten(1), grad_v.flatten(1)
        up_q, *of_q = factor_gradients(grad_q, normed_rows, downs[0], q, wanted[0], needs_x)
        up_k, *of_k = factor_gradients(grad_k, normed, downs[1], k, wanted[1], needs_x)
        up_v, *of_v = factor_gradients(grad_v, normed, downs[2], v, wanted[2], needs_x)
        of_factors = [*of_q, *of_k, *of_v, *of_o]
        if not needs_x:
            return [None, *of_factors]
        total = input_gradient(input_gradient(None, grad_k, up_k, k), grad_v, up_v, v)
        if self.rows is None:
            input_gradient(total, grad_q, up_q, q)
            grad_x = normalise_backward(total, x, self.norm, inverse).add_(grad)
        else:
            total.index_add_(0, self.rows.index, input_gradient(None, grad_q, up_q, q))
            grad_x = normalise_backward(total, x, self.norm, inverse)
            grad_x.index_add_(0, self.rows.index, grad)
        return [grad_x, *of_factors]


def at_rows(
    normed: Tensor, turn: Turn, layout: Layout, rows: Rows | None
) -> tuple[Tensor, Turn, Layout]:
    """Return the normed rows, rotation tables and layout at `rows`, or all if they are None."""
    if rows is None:
        return normed, turn, layout
    tables = (table.index_select(0, rows.index) for table in turn)
    return normed.index_select(0, rows.index), Turn(*tables), rows.layout


class Mlp(NamedTuple):
    """Weights of the MLP half."""

    norm: Tensor  # [d]
    eps: float
    projections: Sequence[Projection]  # gate, up, down

    def forward(self, ctx: Any, x: Tensor, *, keep: bool) -> tuple[Tensor, Kept]:
        gate, up, down = ctx.parts
        normed, inverse = normalise(x, self.norm, self.eps)
        gated, down_g = project(normed, gate)
        upped, down_u = project(normed, up)
        active = F.silu(gated)
        out, down_d = project(active * upped, down)
        kept = normed if ctx.wanted[0].a or ctx.wanted[1].a else None
        return out.add_(x), [kept, inverse, gated, upped, active, down_g, down_u, down_d]

    def backward(self, ctx: Any, grad: Tensor, x: Tensor, kept: list[Any]) -> list[Tensor | None]:
        (gate, up, down), wanted, needs_x = ctx.parts, ctx.wanted, ctx.needs_input_grad[0]
        normed, inverse, gated, upped, active, *downs = kept
        inner = active * upped if wanted[2].a else None
        up_d, *of_down = factor_gradients(grad, inner, downs[2], down, wanted[2], True)
        grad_inner = input_gradient(None, grad, up_d, down)
        grad_up = grad_inner * active
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(upped), gated)
        up_g, *of_gate = factor_gradients(grad_gate, normed, downs[0], gate, wanted[0], needs_x)
        up_u, *of_up = factor_gradients(grad_up, normed, downs[1], up, wanted[1], needs_x)
        of_factors = [*of_gate, *of_up, *of_down]
        if not needs_x:
            return [None, *of_factors]
        total = input_gradient(input_gradient(None, grad_gate, up_g, gate), grad_up, up_u, up)
        return [normalise_backward(total, x, self.norm, inverse).add_(grad), *of_factors]


def add_half(x: Tensor, half: Attention | Mlp, *, recompute: bool) -> Tensor:
    """Return ``x + half(x)`` [T, d], or [R, d] at the rows of the half."""
    # autograd needs all A and B as arguments of the function
    factors = [factor for parts in half.projections for factor in (parts.a, parts.b)]
    return _Half.apply(x, half, recompute, *factors)


class _Half(torch.autograd.Function):
    """Run a half, whose `forward` also returns the tensors that its `backward` needs.

    It finds its projections and the gradients to compute in the context's `parts` and `wanted`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half: Attention | Mlp, recompute: bool, *factors: Tensor | None
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.half, ctx.recompute = half, recompute
        ctx.parts = [parts.as_computed(x.dtype) for parts in half.projections]
        ctx.wanted = [
            Wanted(x.dtype if parts.a is None else parts.a.dtype, *needs[3 + 2 * i : 5 + 2 * i])
            for i, parts in enumerate(half.projections)
        ]
        out, kept = half.forward(ctx, x, keep=any(needs) and not recompute)
        ctx.save_for_backward(x, *([] if recompute else kept))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        if ctx.recompute:
            kept = ctx.half.forward(ctx, x, keep=True)[1]
        grad_x, *of_factors = ctx.half.backward(ctx, grads[0], x, kept)
        return grad_x, None, None, *of_factors
