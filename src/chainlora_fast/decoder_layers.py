"""A faster forward for decoder layers of Llama's shape.

The shape is Llama's, also Mistral's, Qwen2's and SmolLM's: pre-norm, rotary attention, SwiGLU. Each
half of the layer becomes one autograd function (`decoder_halves`). Attention reads the packed row
without transposes. The last layer computes queries and MLP only for the rows that are used. If a
projection is more than a frozen matrix with a LoRA (quantised, hooked, with dropout), or attention
does not run by matmuls, only the element-wise parts are replaced, and the model's own projections
run.

The layer's own forward runs for every call that differs from the probe: without a packed layout,
with a hook on an inner module, a trained norm or bias, another dtype, or autocast. Under gradient
checkpointing, the halves store only their input and recompute the rest in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from chainlora.engine.fast_path import PACKED, FastPath
from chainlora.engine.float32 import widened
from chainlora.engine.patching import installed, is_foreign, replacement
from chainlora.engine.probes import Facts, first_line, probing, relative_difference
from chainlora.models.modes import in_mode
from chainlora.models.shards import whole
from chainlora.models.text_config import base_model, text_config
from chainlora_fast.decoder_halves import (
    Attention,
    Mlp,
    RmsNorm,
    Rotary,
    Turn,
    add_half,
    at_rows,
    make_turn,
)
from chainlora_fast.linear_layers import is_lora_layer, projection_of
from chainlora_fast.packed_attention import LAYOUT, attend
from chainlora_fast.packed_layout import Layout, Rows
from chainlora_fast.projection import Projection

_CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# Largest relative difference of the layer's update and gradient: about twenty roundings of 2⁻²⁴;
# Llama's norm is float32 even in a float64 model. A layer with another formula differs by 0.01 or
# more.
_SAME = 1e-4
_TURN = "turn"  # key of the rotation's tables in a layout


class DecoderLayers(FastPath):
    """Uses a faster forward for decoder layers of Llama's shape, in packed rows."""

    name = "fast decoder layers"
    needs = PACKED
    _watched: Sequence[nn.Module] = ()

    def watched(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return one layer of each kind, and the last one; nothing if a layer has another shape.

        Layers of one model can differ: every fourth layer of SmolLM3 has no rotary embedding.
        Layers are of one kind if they differ only in their weights.
        """
        layers = _layers(model)
        if layers and all(map(_has_shape, layers)):
            kinds = _distinct(layers, text_config(model))
            self._watched = tuple(dict.fromkeys([*kinds, layers[-1]]))
        return self._watched

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why the layers must keep their own forward, or None.

        Compares both forwards of the `watched` layers in float32, with the arguments of their last
        packed call, at positions at the start and the end of the model's context. Uses training
        mode if the model will be trained.
        """
        if facts.random is not None:
            return facts.random
        layers = _layers(model)
        calls = {layer: facts.calls[layer] for layer in self._watched if layer in facts.calls}
        if not calls:
            return "they are not of Llama's shape"
        try:
            for layer, (hidden, kwargs) in calls.items():
                with whole(layer):
                    error = _difference(layer, hidden, kwargs, facts.is_trained)
                if not error <= _SAME:
                    index = layers.index(layer)
                    return f"the fast forward of layer {index} differs by {error:.1g} of its output"
        except Exception as error:  # any error of an architecture: use its own forward
            return f"the probe failed ({first_line(error)})"
        return None

    def apply(self, model: nn.Module) -> None:
        *layers, last = _layers(model)
        for layer in layers:
            self.patches.replace_forward(layer, _forward)
        self.patches.replace_forward(last, _last_forward)


def _distinct(layers: list[Any], config: Any) -> list[Any]:
    """Return the first layer of each kind, by class, fields, shapes and config."""
    per_layer = [
        value
        for value in config.to_dict().values()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    ]
    seen: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        described: list[Any] = [values[index] for values in per_layer]
        for name, module in layer.named_modules():
            fields = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str | None)
                and key not in ("layer_idx", "training")
            }
            shapes = [(key, tuple(p.shape), p.dtype) for key, p in module.named_parameters()]
            described.append((name, type(module), fields, shapes))
        seen.setdefault(repr(described), layer)
    return list(seen.values())


def _difference(layer: Any, hidden: Tensor, kwargs: dict[str, Any], training: bool) -> float:
    """Return the relative difference between the fast forward and the layer's own.

    It is the larger one of two: of the update that the layer adds, and of the gradient of its
    input.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(hidden.shape, generator=generator).to(hidden)
    results = []
    mode = in_mode(layer, training=training)
    with probing(layer), torch.enable_grad(), widened(layer), mode:
        for is_fast in (False, True):
            leaf = hidden.clone().requires_grad_()
            if is_fast:
                layout = kwargs[LAYOUT]
                turn = _turn(layout, kwargs["position_embeddings"])
                out = _compute(layer, leaf[0], layout, turn, None, recompute=False)
                assert out is not None  # None would compare the layer with itself
                out = out[None]
            else:
                out = type(layer).forward(layer, leaf, **kwargs)
                out = out[0] if isinstance(out, tuple) else out
            gradient = torch.autograd.grad((out * direction).sum(), leaf)[0]
            results.append((out.detach() - hidden, gradient - direction))
    return max(
        relative_difference(fast.flatten(), plain.flatten()).item()
        for plain, fast in zip(*results, strict=True)
    )


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


def _is_bypassable(module: nn.Module) -> bool:
    """Return whether a module has no hooks and no replaced forward, so that we can bypass it."""
    return not (
        is_foreign(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_ready(layer: Any, hidden: Tensor) -> bool:
    """Return whether the fast forward may run on the layer now."""
    bypassed = (
        layer.input_layernorm,
        layer.post_attention_layernorm,
        layer.self_attn,
        layer.mlp,
        layer.mlp.act_fn,
    )
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return (
        all(_is_bypassable(module) for module in bypassed)
        and not any(w.requires_grad or w.dtype != hidden.dtype for w in norms)
        and not torch.is_autocast_enabled(hidden.device.type)
        and not (layer.training and getattr(layer.self_attn, "attention_dropout", 0.0))
    )


def _faster(layer: Any, hidden_states: Tensor, *args: Any, last: bool, **kwargs: Any) -> Tensor:
    """Return the layer's output [1, T, d], by its own forward if the fast one may not run.

    The `last` layer returns [1, R, d], at the rows of the layout, if it has any.
    """
    layout, rotary, out = kwargs.get(LAYOUT), kwargs.get("position_embeddings"), None
    if not (layout is None or rotary is None or args) and _is_ready(layer, hidden_states):
        recompute = layer.training and getattr(layer, "gradient_checkpointing", False)
        rows, turn = layout.rows if last else None, _turn(layout, rotary)
        out = _compute(layer, hidden_states[0], layout, turn, rows, recompute=recompute)
    if out is None:
        plain: Tensor = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return plain
    # not a view: FSDP2 adds an autograd hook to a layer's output
    batched: Tensor = torch.ops.aten._unsafe_view(out, [1, *out.shape])
    return batched


_forward = replacement(partial(_faster, last=False))
_last_forward = replacement(partial(_faster, last=True))


def _compute(
    layer: Any, x: Tensor, layout: Layout, turn: Turn, rows: Rows | None, *, recompute: bool
) -> Tensor | None:
    """Return the layer's output [R, d] at `rows`, or [T, d] if they are None, from x [T, d].

    Returns None if checkpointing (`recompute`) must store only the input, but a half would run by
    parts, which store more.
    """
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
    parts = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    of_attention = _projections(parts, x.dtype) if layout.by_matmul else None
    of_mlp = _projections((mlp.gate_proj, mlp.up_proj, mlp.down_proj), x.dtype)
    if recompute and (of_attention is None or of_mlp is None):
        return None
    if of_attention is None:
        x = _attention_by_parts(layer, x, layout, turn, rows)
    else:
        eps, scaling = norm.variance_epsilon, attention.scaling
        half = Attention(norm.weight, eps, of_attention, scaling, turn, layout, rows)
        x = add_half(x, half, recompute=recompute)
    norm = layer.post_attention_layernorm
    if of_mlp is None:
        normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return add_half(x, Mlp(norm.weight, norm.variance_epsilon, of_mlp), recompute=recompute)


def _attention_by_parts(
    layer: Any, x: Tensor, layout: Layout, turn: Turn, rows: Rows | None
) -> Tensor:
    attention, norm = layer.self_attn, layer.input_layernorm
    size = turn.cos.shape[-1]
    normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    key = Rotary.apply(attention.k_proj(normed).unflatten(-1, (-1, size)), *turn)
    value = attention.v_proj(normed).unflatten(-1, (-1, size))
    normed, turn, layout = at_rows(normed, turn, layout, rows)
    query = Rotary.apply(attention.q_proj(normed).unflatten(-1, (-1, size)), *turn)
    mixed = attend(query, key, value, layout, attention.scaling)
    x = x if rows is None else x.index_select(0, rows.index)
    return x + attention.o_proj(mixed.flatten(-2))


def _projections(modules: Iterable[nn.Module], dtype: torch.dtype) -> list[Projection] | None:
    """Return the projections of some modules, or None if one of them must run its own forward."""
    found: list[Any] = [_projection(module) for module in modules]
    return None if any(p is None or p.weight.dtype != dtype for p in found) else found


def _projection(module: Any) -> Projection | None:
    if not _is_bypassable(module):
        return None
    if is_lora_layer(module):
        return projection_of(module) if installed(module) else None
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return None
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return Projection(module.weight, module.bias)


def _turn(layout: Layout, rotary: tuple[Tensor, Tensor]) -> Turn:
    """Return the rotation's tables; the first layer of a forward stores them in the layout."""
    cos, sin = rotary
    made_from, turn = layout.plans.get(_TURN, (None, None))
    if made_from is not cos:
        turn = make_turn(cos[0], sin[0])
        layout.plans[_TURN] = cos, turn
    return turn
