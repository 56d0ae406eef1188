"""A faster forward for decoder layers of Llama's shape, put on in place where a probe shows that it
is the same.

The layer is Llama's (also Mistral's, Qwen2's and SmolLM's): pre-norm, rotary attention, SwiGLU. Its
element-wise parts become autograd functions (`fused`), attention reads the packed row without
transposes, and the last layer computes queries and MLP only for the rows whose hidden states are
used. Projections stay the model's own modules, so LoRA, hooks and quantised layers on them work as
ever.

The layer's own forward runs whenever something is different from what the probe saw: no packed
layout, gradient checkpointing, a hook on an inner module, a trained norm or bias, another dtype,
autocast.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from chainlora.engine.attention import LAYOUT, Layout, Rows, attend, make_layout
from chainlora.engine.bf16_matmul import accelerate_linears, restore_linears
from chainlora.engine.fused import MlpBlock, RmsNorm, Rotary, SwiGlu, Turn, make_turn
from chainlora.engine.hidden_states import ForwardPath, packed_implementation, probing
from chainlora.engine.packing import Segment
from chainlora.engine.patching import Patches, installed, replacement
from chainlora.models.text_config import base_model

log = logging.getLogger(__name__)

_CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# One layer, the same formulas in another order: some twenty roundings of 2⁻²⁴ or 2⁻⁸, squared sums
# of them below this. Llama's own norm is float32 in a float64 model. A layer of another formula is
# off by 0.01 or more in float32.
_LARGEST_DIFFERENCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_LARGEST_DIFFERENCE_TWO_BYTES = 3e-2
_TURN = "turn"  # where a layout keeps the rotation's tables


def accelerate_model(
    model: nn.Module, path: ForwardPath = ForwardPath.PACKED, patches: Patches | None = None
) -> int:
    """Give the decoder layers of `model` the faster forward, in place; return how many have it (0:
    none fits).

    Every layer must have the shape and pass the probe, output and gradient: layers of one model can
    differ (every fourth layer of SmolLM3 has no rotary embedding). `path` is the one that
    `choose_path` found: on the padded path no layer has a layout, so nothing is done.
    """
    patches = patches or Patches()
    if count := accelerate_linears(model, patches):
        log.info("bfloat16 matmuls of %d layers by float32: this CPU has none of its own", count)
    reason = why_plain_layers(model) if path is ForwardPath.PACKED else "the path is padded"
    if reason is not None:
        log.info("plain decoder layers: %s", reason)
        return 0
    log.info("fast decoder layers")
    return install_fast_layers(model, patches)


def install_fast_layers(model: nn.Module, patches: Patches) -> int:
    """Give every decoder layer the faster forward, in place; return how many have it."""
    layers = _layers(model)
    functions = [*[_forward] * (len(layers) - 1), _last_forward]
    return sum(map(patches.replace_forward, layers, functions))


def why_plain_layers(model: nn.Module) -> str | None:
    """Return why the decoder layers of `model` must keep their own forward, None where the faster
    one is the same function."""
    layers = _layers(model)
    if not layers or not all(_has_shape(layer) for layer in layers):
        return "they are not of Llama's shape"
    try:
        difference = max(_probe(model, layer) for layer in layers)
    except Exception as error:  # whatever an architecture trips over, its own forward is right
        return f"{type(error).__name__}: {error}".splitlines()[0]
    dtype = layers[0].input_layernorm.weight.dtype
    if not difference <= _LARGEST_DIFFERENCE.get(dtype, _LARGEST_DIFFERENCE_TWO_BYTES):
        return f"the fast forward differs by {difference:.2g} of the norm"
    return None


def restore_model(model: nn.Module) -> int:
    """Give every decoder layer its own forward back, in place; return how many had the fast one."""
    restore_linears(model)
    restored = 0
    for layer in _layers(model):
        if installed(layer) in (_forward, _last_forward):
            del layer.forward
            restored += 1
    return restored


def _layers(model: nn.Module) -> list[Any]:
    return list(getattr(base_model(model), "layers", None) or [])


def _has_shape(layer: Any) -> bool:
    try:
        alike = all(
            set(dict(layer.get_submodule(name).named_children())) == children
            for name, children in _CHILDREN.items()
        )
        norms = all(
            isinstance(norm.variance_epsilon, float)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        return alike and norms and isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation)
    except AttributeError:
        return False


def _probe(model: nn.Module, layer: Any) -> float:
    """Return the larger relative difference, of output and of input gradient, of the fast forward
    to the layer's own.

    Two sequences of random states of the size that an embedding has after a norm.
    """
    base: Any = base_model(model)
    weight = layer.input_layernorm.weight
    layout = make_layout((Segment(0, 5, -1), Segment(5, 12, -1)), weight.device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 12, weight.shape[0])
    x, direction = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    positions = torch.tensor([[*range(5), *range(7)]], device=weight.device)
    results = []
    with probing(model), torch.enable_grad(), packed_implementation(base):
        rotary = base.rotary_emb(x, position_ids=positions)
        for fast in (False, True):
            leaf = x.clone().requires_grad_()
            if fast:
                out = _compute(layer, leaf[0], layout, rotary, None)[None]
            else:
                out = type(layer).forward(
                    layer,
                    leaf,
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=rotary,
                    **{LAYOUT: layout},
                )
            results.append((out.detach(), torch.autograd.grad((out * direction).sum(), leaf)[0]))
    return max(
        ((mine - own).double().norm() / own.double().norm()).item()
        for own, mine in zip(*results, strict=True)
    )


def _quiet(module: nn.Module) -> bool:
    """Say whether no hook waits for this module to be called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _ready(layer: Any, hidden: Tensor) -> bool:
    bypassed = (
        layer.input_layernorm,
        layer.post_attention_layernorm,
        layer.self_attn,
        layer.mlp,
        layer.mlp.act_fn,
    )
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return (
        all(_quiet(module) for module in bypassed)
        and not any(w.requires_grad or w.dtype != hidden.dtype for w in norms)
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def _plain(linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and not linear.weight.requires_grad
        and type(linear.weight) is nn.Parameter
        and _quiet(linear)
    )


@replacement
def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout, rotary = kwargs.get(LAYOUT), kwargs.get("position_embeddings")
    if layout is None or rotary is None or args or not _ready(layer, hidden_states):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    return _compute(layer, hidden_states[0], layout, rotary, None)[None]


@replacement
def _last_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return hidden states [1, R, d] of the layout's rows alone, or [1, T, d] where it names
    none."""
    layout, rotary = kwargs.get(LAYOUT), kwargs.get("position_embeddings")
    if (
        layout is None
        or layout.rows is None
        or rotary is None
        or args
        or not _ready(layer, hidden_states)
    ):
        return _forward(layer, hidden_states, *args, **kwargs)
    return _compute(layer, hidden_states[0], layout, rotary, layout.rows)[None]


def _compute(
    layer: Any, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor], rows: Rows | None
) -> Tensor:
    """Return the layer's output at `rows` (None: all), from x [T, d]."""
    attention, norm = layer.self_attn, layer.input_layernorm
    turn = _turn(layout, rotary)
    size = turn.cos.shape[-1]
    normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    key = Rotary.apply(attention.k_proj(normed).unflatten(-1, (-1, size)), *turn)
    value = attention.v_proj(normed).unflatten(-1, (-1, size))
    if rows is not None:
        x, normed = x.index_select(0, rows.index), normed.index_select(0, rows.index)
        turn = Turn(*(table.index_select(0, rows.index) for table in turn))
        layout = rows.layout
    query = Rotary.apply(attention.q_proj(normed).unflatten(-1, (-1, size)), *turn)
    dropout = getattr(attention, "attention_dropout", 0.0) if layer.training else 0.0
    mixed = attend(query, key, value, layout, attention.scaling, dropout)
    return _mlp(layer, x + attention.o_proj(mixed.flatten(-2)))


def _turn(layout: Layout, rotary: tuple[Tensor, Tensor]) -> Turn:
    """Return the rotation's tables, made by the first layer of a forward and kept with its layout
    for the others."""
    cos, sin = rotary
    made_from, turn = layout.plans.get(_TURN, (None, None))
    if made_from is not cos:
        turn = make_turn(cos[0], sin[0])
        layout.plans[_TURN] = cos, turn
    return turn


def _mlp(layer: Any, x: Tensor) -> Tensor:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if all(_plain(linear) for linear in linears):
        return MlpBlock.apply(
            x, norm.weight, norm.variance_epsilon, *(linear.weight for linear in linears)
        )
    normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    return x + mlp.down_proj(SwiGlu.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))
