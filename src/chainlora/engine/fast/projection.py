"""A frozen linear map with a LoRA on it, ``x Wᵀ + c + s · (x Aᵀ) Bᵀ``, and its gradients by hand.

Autograd keeps, for the same map composed of plain operations, the input once for each matmul, the
scaled product and, in two-byte formats, float32 copies of input and output. Here the input is kept
once with ``x Aᵀ`` (n × rank), products are added in place, and the adapter's matmuls run in the
input's dtype; A and B may be float32 masters, whose gradients come back in float32.

With g the gradient of the output (n × out): ``∂B = s · gᵀ (x Aᵀ)``, ``∂A = s · (g B)ᵀ x``,
``∂x = g W + s · (g B) A``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chainlora.engine.matmul import add_product_, linear, product


class Projection(NamedTuple):
    """A linear map as a module holds it: W (out × in), c, and a LoRA's A (rank × in), B (out ×
    rank) and scaling, or none."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    def as_computed(self, dtype: torch.dtype) -> Computed:
        """Return it with small copies of the factors, in `dtype` and with the long side of both in
        rows: a float32 matmul with eight columns takes 2.5 times as long where those are not rows
        of the transpose."""
        if self.a is None or self.b is None:
            return Computed(self.weight, self.bias, None, None, 1.0)
        b_rows = self.b.T.to(dtype).contiguous()
        return Computed(self.weight, self.bias, self.a.to(dtype), b_rows, self.scaling)


class Computed(NamedTuple):
    """A projection as it is computed with: `a` and `b_rows` are rank × in and rank × out."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b_rows: Tensor | None
    scaling: float


class Wanted(NamedTuple):
    """Which factors want a gradient, and in which dtype."""

    dtype: torch.dtype
    a: bool
    b: bool


def project(x: Tensor, own: Computed) -> tuple[Tensor, Tensor | None]:
    """Return the output [n, out] for x [n, in], and ``x Aᵀ`` [n, rank]."""
    out = linear(x, own.weight, own.bias)
    if own.a is None or own.b_rows is None:
        return out, None
    down = linear(x, own.a)
    return add_product_(out, down, own.b_rows, own.scaling), down


def factor_gradients(
    grad: Tensor,
    x: Tensor | None,
    down: Tensor | None,
    own: Computed,
    wanted: Wanted,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ``s · g B`` [n, rank], which `input_gradient` wants, and the gradients of A and B.

    `x` is needed for that of A alone, `down` for that of B.
    """
    up = grad_a = grad_b = None
    if wanted.b and down is not None:
        grad_b = product(down.T, grad).T.to(wanted.dtype).contiguous().mul_(own.scaling)
    if own.b_rows is not None and (needs_x or wanted.a):
        up = linear(grad, own.b_rows).mul_(own.scaling)
    if wanted.a and up is not None and x is not None:
        grad_a = product(up.T, x).to(wanted.dtype)
    return up, grad_a, grad_b


def input_gradient(total: Tensor | None, grad: Tensor, up: Tensor | None, own: Computed) -> Tensor:
    """Return the gradient of the input, added to `total` in place where there is one."""
    if total is None:
        total = product(grad, own.weight)
    else:
        add_product_(total, grad, own.weight)
    return total if up is None or own.a is None else add_product_(total, up, own.a)


class ProjectionFunction(torch.autograd.Function):
    """A projection of x (… × in), the last inputs as `Projection` has them; W and c are frozen."""

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
        own = Projection(weight, bias, a, b, scaling).as_computed(x.dtype)
        out, down = project(flat, own)
        needs_a, needs_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(
            flat if needs_a else None, weight, own.a, own.b_rows, down if needs_b else None
        )
        ctx.factors = Wanted(x.dtype if a is None else a.dtype, needs_a, needs_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        # no view of what was computed: autograd refuses in-place changes of such a result
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b_rows, down = ctx.saved_tensors
        own = Computed(weight, None, a, b_rows, ctx.scaling)
        grad, needs_x = grads[0].reshape(-1, weight.shape[0]), ctx.needs_input_grad[0]
        up, grad_a, grad_b = factor_gradients(grad, flat, down, own, ctx.factors, needs_x)
        grad_x = input_gradient(None, grad, up, own).view(ctx.shape) if needs_x else None
        return grad_x, None, None, grad_a, grad_b, None
