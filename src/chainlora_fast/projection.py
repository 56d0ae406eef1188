"""A frozen linear map with a LoRA, ``x Wᵀ + c + s · (x Aᵀ) Bᵀ``, with hand-written gradients.

For the same map in plain operations, autograd stores the input once per matmul, the scaled product
and, in two-byte dtypes, float32 copies of input and output. This function stores the input once and
``x Aᵀ`` [n, rank], and adds products in place. The matmuls of the adapter run in the input's dtype;
A and B may be float32, and get float32 gradients.

With g the gradient of the output [n, out]: ``∂B = s · gᵀ (x Aᵀ)``, ``∂A = s · (g B)ᵀ x``,
``∂x = g W + s · (g B) A``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chainlora.engine.matmul import add_product_, linear, product


class Projection(NamedTuple):
    """A linear map with the tensors of its module; A and B are None without a LoRA."""

    weight: Tensor  # W [out, in]
    bias: Tensor | None  # c [out]
    a: Tensor | None = None  # [rank, in]
    b: Tensor | None = None  # [out, rank]
    scaling: float = 1.0

    def as_computed(self, dtype: torch.dtype) -> Computed:
        """Return the projection with copies of the factors in `dtype`, both with `rank` rows.

        A float32 matmul with eight columns takes 2.5 times as long if they are not contiguous.
        """
        if self.a is None or self.b is None:
            return Computed(self.weight, self.bias, None, None, 1.0)
        b_rows = self.b.T.to(dtype).contiguous()
        return Computed(self.weight, self.bias, self.a.to(dtype), b_rows, self.scaling)


class Computed(NamedTuple):
    """A projection in the form that the functions below compute with."""

    weight: Tensor  # W [out, in]
    bias: Tensor | None  # c [out]
    a: Tensor | None  # [rank, in]
    b_rows: Tensor | None  # Bᵀ [rank, out]
    scaling: float


class Wanted(NamedTuple):
    """Which factors need a gradient, and in which dtype."""

    dtype: torch.dtype
    a: bool
    b: bool


def project(x: Tensor, p: Computed) -> tuple[Tensor, Tensor | None]:
    """Return the output [n, out] for x [n, in], and ``x Aᵀ`` [n, rank]."""
    out = linear(x, p.weight, p.bias)
    if p.a is None or p.b_rows is None:
        return out, None
    down = linear(x, p.a)
    return add_product_(out, down, p.b_rows, p.scaling), down


def factor_gradients(
    grad: Tensor,
    x: Tensor | None,
    down: Tensor | None,
    p: Computed,
    wanted: Wanted,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``s · g B`` [n, rank] for `input_gradient`, and the gradients of A and B.

    `grad` is g [n, out]. The gradient of A needs x [n, in], the one of B needs `down`, ``x Aᵀ``
    [n, rank].
    """
    up = grad_a = grad_b = None
    if wanted.b and down is not None:
        grad_b = product(down.T, grad).T.to(wanted.dtype).contiguous().mul_(p.scaling)
    if p.b_rows is not None and (needs_x or wanted.a):
        up = linear(grad, p.b_rows).mul_(p.scaling)
    if wanted.a and up is not None and x is not None:
        grad_a = product(up.T, x).to(wanted.dtype)
    return up, grad_a, grad_b


def input_gradient(total: Tensor | None, grad: Tensor, up: Tensor | None, p: Computed) -> Tensor:
    """Return the gradient of the input [n, in]; if `total` is given, add to it in place."""
    if total is None:
        total = product(grad, p.weight)
    else:
        add_product_(total, grad, p.weight)
    return total if up is None or p.a is None else add_product_(total, up, p.a)


class ProjectionFunction(torch.autograd.Function):
    """Projects x [..., in]; the other inputs are the fields of `Projection`; W and c are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p = Projection(weight, bias, a, b, scaling).as_computed(x.dtype)
        out, down = project(flat, p)
        needs_a, needs_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(
            flat if needs_a else None, weight, p.a, p.b_rows, down if needs_b else None
        )
        ctx.factors = Wanted(x.dtype if a is None else a.dtype, needs_a, needs_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        # not a view: autograd forbids in-place changes of a custom function's view
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b_rows, down = ctx.saved_tensors
        p = Computed(weight, None, a, b_rows, ctx.scaling)
        grad, needs_x = grads[0].reshape(-1, weight.shape[0]), ctx.needs_input_grad[0]
        up, grad_a, grad_b = factor_gradients(grad, flat, down, p, ctx.factors, needs_x)
        grad_x = input_gradient(None, grad, up, p).view(ctx.shape) if needs_x else None
        return grad_x, None, None, grad_a, grad_b, None
