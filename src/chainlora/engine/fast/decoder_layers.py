"""A faster forward for decoder layers of Llama's shape, put on in place where a probe shows that it
is the same.

The layer is Llama's (also Mistral's, Qwen2's and SmolLM's): pre-norm, rotary attention, SwiGLU. Its
two halves become one autograd function each (`decoder_halves`), attention reads the packed row
without transposes, and the last layer computes queries and MLP only for the rows whose hidden
states are used. Where a projection is more than a frozen matrix with a LoRA (quantised, hooked,
with dropout), or attention is not by matmuls, only the element-wise parts do, and projections stay
the model's own modules.

The layer's own forward runs whenever something is different from what the probe saw: no packed
layout, a hook on an inner module, a trained norm or bias, another dtype, autocast. Under gradient
checkpointing the halves keep their input alone and compute the rest again in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from chainlora.engine.fast.decoder_halves import (
    Attention,
    Mlp,
    RmsNorm,
    Rotary,
    Turn,
    attention_block,
    make_turn,
    mlp_block,
)
from chainlora.engine.fast.linear_layers import is_lora_layer, projection_of
from chainlora.engine.fast.packed_attention import LAYOUT, attend
from chainlora.engine.fast.packed_layout import Layout, Rows
from chainlora.engine.fast.plugin import PACKED, FastPath
from chainlora.engine.fast.projection import Projection
from chainlora.engine.float32 import widened
from chainlora.engine.patching import installed, is_foreign, replacement
from chainlora.engine.probes import Facts, first_line, probing, relative_difference
from chainlora.models.modes import in_mode
from chainlora.models.shards import whole
from chainlora.models.text_config import base_model, text_config

_CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# Of what the layer adds to its input, and of the gradient: some twenty roundings of 2⁻²⁴, and
# Llama's own norm is float32 in a float64 model. A layer of another formula is off by 0.01 or more.
_SAME = 1e-4
_TURN = "turn"  # where a layout keeps the rotation's tables


class DecoderLayers(FastPath):
    """A faster forward for every decoder layer of Llama's shape, in a packed row."""

    name = "fast decoder layers"
    needs = PACKED

    def __init__(self) -> None:
        super().__init__()
        self._watched: list[nn.Module] = []

    def watched(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return one layer of each kind, and the last; none where a layer is not of the shape.

        Layers of one model can differ (every fourth layer of SmolLM3 has no rotary embedding);
        alike are those that do not differ in anything but their weights.
        """
        layers = _layers(model)
        if layers and all(map(_has_shape, layers)):
            kinds = _distinct(layers, text_config(model))
            self._watched = list(dict.fromkeys([*kinds, layers[-1]]))
        return self._watched

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why the layers must keep their own forward, None where ours is the same function.

        Asked of the `watched` layers, in float32, with what each was called with in a packed row
        whose positions begin and end the model's context; in training mode if it is to be trained.
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
                    found = _difference(layer, hidden, kwargs, facts.is_trained)
                if not found <= _SAME:
                    index = layers.index(layer)
                    return f"the fast forward of layer {index} differs by {found:.1g} of its output"
        except Exception as error:  # whatever an architecture trips over, its own forward is right
            return f"the probe failed ({first_line(error)})"
        return None

    def apply(self, model: nn.Module) -> None:
        *layers, last = _layers(model)
        for layer in layers:
            self.patches.replace_forward(layer, _forward)
        self.patches.replace_forward(last, _last_forward)


def _distinct(layers: list[Any], config: Any) -> list[Any]:
    """Return the layers that differ from all before them in class, fields, shapes or config."""
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
    """Return the larger relative difference, of what the layer adds and of the gradient of its
    input, between the fast forward and its own."""
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
                out = _compute(layer, leaf[0], layout, turn, None, again=False)
                assert out is not None  # the layer's own forward would agree with itself
                out = out[None]
            else:
                out = type(layer).forward(layer, leaf, **kwargs)
                out = out[0] if isinstance(out, tuple) else out
            gradient = torch.autograd.grad((out * direction).sum(), leaf)[0]
            results.append((out.detach() - hidden, gradient - direction))
    return max(
        relative_difference(mine.flatten(), own.flatten()).item()
        for own, mine in zip(*results, strict=True)
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


def _quiet(module: nn.Module) -> bool:
    """Say whether nobody waits for this module to be called, by a hook or in its place."""
    return not (
        is_foreign(module)
        or module._forward_hooks
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
        and not torch.is_autocast_enabled(hidden.device.type)
        and not (layer.training and getattr(layer.self_attn, "attention_dropout", 0.0))
    )


@replacement
def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _faster(layer, hidden_states, args, kwargs, last=False)


@replacement
def _last_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _faster(layer, hidden_states, args, kwargs, last=True)


def _faster(
    layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, last: bool
) -> Tensor:
    """Return the layer's output, by its own forward where something is not as the probe saw it:
    [1, T, d], of the `last` layer [1, R, d] at the layout's rows if it names some."""
    layout, rotary, out = kwargs.get(LAYOUT), kwargs.get("position_embeddings"), None
    if not (layout is None or rotary is None or args) and _ready(layer, hidden):
        again = layer.training and getattr(layer, "gradient_checkpointing", False)
        rows, turn = layout.rows if last else None, _turn(layout, rotary)
        out = _compute(layer, hidden[0], layout, turn, rows, again=again)
    if out is None:
        own: Tensor = type(layer).forward(layer, hidden, *args, **kwargs)
        return own
    # no view: FSDP2 puts a hook of autograd on a layer's output
    found: Tensor = torch.ops.aten._unsafe_view(out, [1, *out.shape])
    return found


def _compute(
    layer: Any, x: Tensor, layout: Layout, turn: Turn, rows: Rows | None, *, again: bool
) -> Tensor | None:
    """Return the layer's output at `rows` (None: all), from x [T, d].

    None where checkpointing (`again`) asks for what single parts cannot do: to keep nothing.
    """
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
    parts = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    of_attention = _projections(parts, x.dtype) if layout.by_matmul else None
    of_mlp = _projections((mlp.gate_proj, mlp.up_proj, mlp.down_proj), x.dtype)
    if again and (of_attention is None or of_mlp is None):
        return None
    if of_attention is None:
        x = _attention_by_parts(layer, x, layout, turn, rows)
    else:
        eps, scaling = norm.variance_epsilon, attention.scaling
        half = Attention(norm.weight, eps, of_attention, scaling, turn, layout, rows)
        x = attention_block(x, half, again=again)
    norm = layer.post_attention_layernorm
    if of_mlp is None:
        normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return mlp_block(x, Mlp(norm.weight, norm.variance_epsilon, of_mlp), again=again)


def _attention_by_parts(
    layer: Any, x: Tensor, layout: Layout, turn: Turn, rows: Rows | None
) -> Tensor:
    attention, norm = layer.self_attn, layer.input_layernorm
    size = turn.cos.shape[-1]
    normed = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    key = Rotary.apply(attention.k_proj(normed).unflatten(-1, (-1, size)), *turn)
    value = attention.v_proj(normed).unflatten(-1, (-1, size))
    if rows is not None:
        x, normed = x.index_select(0, rows.index), normed.index_select(0, rows.index)
        turn = Turn(*(table.index_select(0, rows.index) for table in turn))
        layout = rows.layout
    query = Rotary.apply(attention.q_proj(normed).unflatten(-1, (-1, size)), *turn)
    mixed = attend(query, key, value, layout, attention.scaling)
    return x + attention.o_proj(mixed.flatten(-2))


def _projections(modules: Iterable[nn.Module], dtype: torch.dtype) -> list[Projection] | None:
    """Return what the modules compute, None where one of them needs its own forward."""
    found = []
    for module in modules:
        own = _projection(module)
        if own is None or own.weight.dtype != dtype:
            return None
        found.append(own)
    return found


def _projection(module: Any) -> Projection | None:
    if not _quiet(module):
        return None
    if is_lora_layer(module):
        return projection_of(module) if installed(module) else None
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return None
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return Projection(module.weight, module.bias)


def _turn(layout: Layout, rotary: tuple[Tensor, Tensor]) -> Turn:
    """Return the rotation's tables, made by the first layer of a forward and kept in its layout."""
    cos, sin = rotary
    made_from, turn = layout.plans.get(_TURN, (None, None))
    if made_from is not cos:
        turn = make_turn(cos[0], sin[0])
        layout.plans[_TURN] = cos, turn
    return turn
