"""Attention over a packed row: each token sees its own sequence and nothing else.

Registered with transformers under the name ``chainlora_packed``, so any architecture that looks its
attention up there can run packed. A call without a layout is the implementation that the model had
before, mask included: a model set to ours still generates and scores as before.

By the layout's batches of small attentions: on a CPU plain matmuls (torch's fused kernel needs five
times as long for the backward of a short bfloat16 sequence); elsewhere, for long float32 sequences,
and under dropout, SDPA.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chainlora.engine.fast.packed.layout import Layout
from chainlora.engine.fast.packed.matmul_attention import MatmulAttention, make_plan
from chainlora.engine.matmul import is_slow

NAME = "chainlora_packed"
LAYOUT = "packed_layout"
# What an architecture adds to attention by these arguments cannot be left out silently. Where it is
# neither eager nor SDPA, `indices` stand for the mask of the keys that DeepSeek V3.2 picks.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "indices", "block_indices")


class CannotPackError(Exception):
    """Attention of a kind that a packed row does not have."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    plain: str = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend by `packed_layout`: query, key, value [1, heads, T, size] → [1, T, heads, size].

    Without a layout, `plain` names the implementation of transformers that computes instead.

    Raises:
        CannotPackError: the architecture asks for something this function does not compute.
    """
    if packed_layout is None:
        attention = _plain_attention(module, plain)
        return attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise CannotPackError(f"packed attention does not compute {asked[0]}")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise CannotPackError("packed attention does not compute a mask of the model's own")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, packed_layout, scaling, dropout)[None], None


def _plain_attention(module: nn.Module, plain: str) -> Any:
    if plain == "sdpa":
        return sdpa_attention_forward
    if plain == "eager":  # not registered: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[plain]


def packed_name(before: str | None) -> str:
    """Return the name of the packed implementation for a model that is set to `before`.

    Each one is registered once; it differs from the others in what computes a call without a
    layout, and in the mask of that call.
    """
    before = before or "eager"
    if before.startswith(NAME):
        return before
    if before == "sdpa":
        return NAME
    name = f"{NAME}_{before}"
    AttentionInterface.register(name, partial(packed_attention, plain=before))
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    return name


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend over a packed row: query [T, heads, size], key [T, key heads, size], value [T, key
    heads, own size] → [T, heads, own size]."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout.by_matmul and not dropout:
        return MatmulAttention.apply(query, key, value, layout, scaling)
    if is_slow(query):
        mixed = _sdpa(query.float(), key.float(), value.float(), layout, scaling, dropout)
        return mixed.to(query.dtype)
    return _sdpa(query, key, value, layout, scaling, dropout)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, dropout: float
) -> Tensor:
    parts = []
    for group in layout.groups:
        (b, tq), tk = group.queries.shape, group.keys.shape[1]
        q = query[group.queries.flatten()].unflatten(0, (b, tq)).transpose(1, 2)
        k, v = (x[group.keys.flatten()].unflatten(0, (b, tk)).transpose(1, 2) for x in (key, value))
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mask = None
        if not group.causal:  # which keys each query sees, [B or 1, 1, Tq, Tk]
            mask = F.pad(group.visible(), (group.first, 0), value=True)[:, None]
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=group.causal, scale=scaling, dropout_p=dropout
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[make_plan(layout, 1, 1, query.dtype).back]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
