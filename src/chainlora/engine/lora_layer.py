"""One autograd function for a LoRA layer: ``y = x Wᵀ + c + s · (x Aᵀ) Bᵀ``.

Autograd keeps, for the same layer composed of plain operations, the input once for each matmul, the
scaled product and, in two-byte formats, float32 copies of input and output. Here the input is kept
once with ``x Aᵀ`` (n × rank), products are added in place, and the adapter's matmuls run in the
input's dtype; A and B may be float32 masters, whose gradients come back in float32.

PEFT's own forward stays where the layer is anything else, asked anew at each call: other adapters
active, merged, disabled, dropout, DoRA and other variants, a bias on B, a base layer that is not
exactly Linear or Conv1D (quantised, sharded, hooked) or is itself trained, autocast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from chainlora.engine.bf16_matmul import add_product_, linear, product
from chainlora.engine.patching import Patches, replacement
from chainlora.errors import ModelError


def accelerate_layers(layers: Iterable[nn.Module], patches: Patches) -> int:
    """Give these LoRA layers the fused forward, in place; return how many would take it now.

    Raises:
        ModelError: a layer that holds no LoRA.
    """
    taken = 0
    for layer in layers:
        if not is_lora_layer(layer):
            raise ModelError(f"only LoRA layers have a fused forward (got {type(layer).__name__})")
        taken += patches.replace_forward(layer, _forward) and active_adapter(layer) is not None
    return taken


def is_lora_layer(module: nn.Module) -> bool:
    """Say whether the module is a LoRA layer over a linear map."""
    return all(
        hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "active_adapters")
    )


def active_adapter(layer: Any) -> str | None:
    """Return the one adapter the fused forward would compute, None where PEFT's own forward is
    needed."""
    base, active = (
        layer.base_layer,
        [name for name in layer.active_adapters if name in layer.lora_A],
    )
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    name = active[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = (
        type(base) in (nn.Linear, Conv1D)
        and type(a) is nn.Linear
        and type(b) is nn.Linear
        and b.bias is None
        and a.bias is None
        and (type(dropout) is nn.Identity or not layer.training)
        and name not in layer.lora_magnitude_vector
        and name not in getattr(layer, "lora_variant", ())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (base, a, b))
    )
    if not plain or not _whole(base.weight, a.weight, b.weight):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return name


def _whole(*weights: Tensor) -> bool:
    """Say whether the weights are ordinary floating tensors (no shard, no quantised storage)."""
    return all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() for w in weights)


@replacement
def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = (
        None
        if args or kwargs or torch.is_autocast_enabled(x.device.type)
        else active_adapter(layer)
    )
    base = layer.base_layer
    if name is None or x.dtype != base.weight.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    weight = base.weight.T if type(base) is Conv1D else base.weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraFunction.apply(x, weight, base.bias, a, b, layer.scaling[name])


class LoraFunction(torch.autograd.Function):
    """``x Wᵀ + c + s · (x Aᵀ) Bᵀ`` for a frozen W (out × in) and c; A (rank × in), B (out × rank).

    With g the gradient of the output (n × out): ``∂B = s · gᵀ (x Aᵀ)``, ``∂A = s · (g B)ᵀ x``,
    ``∂x = g W + s · (g B) A``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.factor_dtypes = a.dtype, b.dtype
        # small copies, kept for backward: in the input's dtype, and the long side of both in rows.
        # A float32 matmul with eight columns takes 2.5 times as long where those are not rows of
        # the transpose.
        a, b_rows = a.to(x.dtype), b.T.to(x.dtype).contiguous()
        down = linear(flat, a)
        out = linear(x, weight, bias)  # of its final shape: autograd refuses changes to a view
        add_product_(out.view(-1, out.shape[-1]), down, b_rows, scaling)
        _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            flat if needs_a else None, weight, a, b_rows, down if needs_b else None
        )
        ctx.scaling, ctx.shape = scaling, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b_rows, down = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_a = grad_b = None
        if needs_b:
            grad_b = product(down.T, grad).T.to(ctx.factor_dtypes[1]).contiguous().mul_(ctx.scaling)
        if needs_x or needs_a:
            up = linear(grad, b_rows).mul_(ctx.scaling)
        if needs_a:
            grad_a = product(up.T, flat).to(ctx.factor_dtypes[0])
        if needs_x:
            grad_x = add_product_(product(grad, weight), up, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
