"""Attention over a packed row: each token sees only its own sequence.

It is registered with transformers (`packed_name`), so it works in every architecture that looks its
attention up there. A call without a layout runs the model's previous implementation with its mask,
so the model still generates and scores as before.

Attention runs in the batches of the layout. On a CPU it uses plain matmuls, since torch's fused
kernel takes five times as long for the backward of a short bfloat16 sequence. On other devices, for
long float32 sequences and with dropout it uses SDPA.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chainlora.engine.matmul import is_slow
from chainlora_fast.packed_layout import Layout

_NAME = "chainlora_packed"
LAYOUT = "packed_layout"
Probabilities = list[Tensor | None]  # by group; None if backward computes them again
# Arguments by which architectures change attention, so packed attention must not ignore them.
# `indices` are the keys that DeepSeek V3.2 selects, when its attention is neither eager nor SDPA.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "indices", "block_indices")


class CannotPackError(Exception):
    """Packed attention does not support an argument of the model."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    *,
    plain: str,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Compute attention with transformers' signature: [1, heads, T, size] to [1, T, heads, size].

    A call without `packed_layout` runs transformers' `plain` implementation. With it, the mask must
    have one element. Raises CannotPackError for an unsupported argument or the model's own mask.
    """
    if packed_layout is None:
        attention: Any
        if plain == "eager":  # not registered: each modeling file defines it
            attention = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attention = ALL_ATTENTION_FUNCTIONS[plain]
        return attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CannotPackError(f"packed attention does not support {name}")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise CannotPackError("packed attention does not support the model's own mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, packed_layout, scaling, dropout)[None], None


def packed_name(before: str | None) -> str:
    """Return the name of the packed implementation for a model set to `before`; register it.

    Each name has its own implementation and mask for calls without a layout: those of `before`.
    """
    before = before or "eager"
    if before.startswith(_NAME):
        return before
    name = f"{_NAME}_{before}"
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
    """Return attention over a packed row, [T, heads, value size].

    The query is [T, heads, size], the key [T, key heads, size], and the value [T, key heads, value
    size]. The scores are multiplied by `scaling`, by default 1/√size.
    """
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


# --- batched matmuls: softmax(s·Q Kᵀ + mask) V; heads with a common key head share a matmul ---


def attend_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, *, keep: bool
) -> tuple[Tensor, Probabilities]:
    """Return `attend` by matmuls, and the probabilities for `attend_backward` if `keep` is set."""
    if is_slow(query):
        wide = query.float(), key.float(), value.float()
        out, kept = attend_forward(*wide, layout, scaling, keep=keep)
        return out.to(query.dtype), kept
    plan = make_plan(layout, query.shape[1], key.shape[1], query.dtype)
    rows = [x.reshape(-1, x.shape[-1]) for x in (query, key, value)]
    parts, kept = [], []
    for i, group in enumerate(layout.groups):
        q, k, v = _gather(rows, plan, i, key.shape[1], layout)
        p = _probabilities(q, k, plan.masks[i], scaling)
        parts.append(torch.bmm(p, v).flatten(0, 1))
        kept.append(p if keep and group.keep else None)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.index_select(0, plan.back).view(*query.shape[:-1], value.shape[-1]), kept


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Probabilities,
    layout: Layout,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the gradient of the result."""
    if is_slow(query):
        wide = grad.float(), query.float(), key.float(), value.float()
        grads = attend_backward(*wide, probabilities, layout, scaling)
        return grads[0].to(query.dtype), grads[1].to(query.dtype), grads[2].to(query.dtype)
    plan = make_plan(layout, query.shape[1], key.shape[1], query.dtype)
    rows = [x.reshape(-1, x.shape[-1]) for x in (query, key, value)]
    grad = grad.reshape(-1, grad.shape[-1])
    queries, keys, values = [], [], []
    for i in range(len(layout.groups)):
        q, k, v = _gather(rows, plan, i, key.shape[1], layout)
        g = grad.index_select(0, plan.queries[i])
        if plan.padding[i].numel():
            g.index_fill_(0, plan.padding[i], 0.0)
        g = g.view(*q.shape[:-1], g.shape[-1])
        p = probabilities[i]
        if p is None:
            p = _probabilities(q, k, plan.masks[i], scaling)
        values.append(torch.bmm(p.transpose(1, 2), g))
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
        queries.append(torch.bmm(scores, k).flatten(0, 1))
        keys.append(torch.bmm(scores.transpose(1, 2), q))
    whole = queries[0] if len(queries) == 1 else torch.cat(queries)
    grad_query = whole.index_select(0, plan.back).mul_(scaling).view(query.shape)
    grad_key = _to_keys(keys, plan, layout, key.shape).mul_(scaling)
    return grad_query, grad_key, _to_keys(values, plan, layout, value.shape)


class MatmulAttention(torch.autograd.Function):
    """`attend_forward` as an autograd function."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        out, kept = attend_forward(query, key, value, layout, scaling, keep=keep)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # read once: checkpointing counts reads
        gradients = attend_backward(grads[0], query, key, value, kept, ctx.layout, ctx.scaling)
        return *gradients, None, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return softmax(s·q kᵀ + mask) [B, Tq, Tk]; the mask covers the last keys."""
    if mask.shape[-1] == k.shape[1]:
        return torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling), -1)
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scaling)
    scores[..., k.shape[1] - mask.shape[-1] :].add_(mask)
    return torch.softmax(scores, -1)


def _gather(
    rows: list[Tensor], plan: _Plan, i: int, key_heads: int, layout: Layout
) -> list[Tensor]:
    batch = layout.groups[i].queries.shape[0] * key_heads
    q = rows[0].index_select(0, plan.queries[i])
    k, v = (x.index_select(0, plan.keys[i]) for x in rows[1:])
    return [x.view(batch, -1, x.shape[-1]) for x in (q, k, v)]


def _to_keys(parts: list[Tensor], plan: _Plan, layout: Layout, shape: torch.Size) -> Tensor:
    """Scatter gradients of keys back to the packed row, and sum those of keys used several times.

    They are given by group [B · key heads, Tk, size]; the result's `shape` is [T, key heads, size].
    """
    if plan.back_keys is not None:
        whole = parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])
        return whole.flatten(0, -2).index_select(0, plan.back_keys).view(shape)
    # in float32: a shared passage sums many terms
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.zeros(shape, dtype=wide, device=parts[0].device)
    for group, rows, part in zip(layout.groups, plan.keys, parts, strict=True):
        if group.spans is None:
            total.view(-1, shape[-1]).index_add_(0, rows, part.flatten(0, 1).to(wide))
            continue
        for keys, gradient in zip(group.spans, part.unflatten(0, (-1, shape[1])), strict=True):
            total[keys.start : keys.stop] += gradient[:, : len(keys)].transpose(0, 1)
    return total.to(parts[0].dtype)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Row indices for given numbers of heads; a row is one head of one token.

    The first four fields have one tensor per group.
    """

    queries: tuple[Tensor, ...]  # rows of the query in the order (b, key head, repeat, i)
    keys: tuple[Tensor, ...]  # rows of key and value in the order (b, key head, j)
    masks: tuple[Tensor, ...]  # 0 or -inf, [1 or B · key heads, repeats · Tq, Tk − first]
    padding: tuple[Tensor, ...]  # indices of padded queries in that order
    back: Tensor  # index of each query row in the concatenated results of all groups
    back_keys: Tensor | None  # the same for key rows, if each one is in one group only


def make_plan(layout: Layout, heads: int, key_heads: int, dtype: torch.dtype) -> _Plan:
    """Return the row indices for these numbers of heads; the layout caches them."""
    cache_key = (heads, key_heads, dtype)
    if cache_key in layout.plans:
        return layout.plans[cache_key]
    device = layout.groups[0].queries.device
    repeats = heads // key_heads
    head, key_head = torch.arange(heads, device=device), torch.arange(key_heads, device=device)
    queries, keys, masks, padding = [], [], [], []
    for group in layout.groups:
        tq = group.queries.shape[1]
        queries.append((group.queries[:, None, :] * heads + head[:, None]).flatten())
        keys.append((group.keys[:, None, :] * key_heads + key_head[:, None]).flatten())
        visible = group.visible()
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(~visible, float("-inf")).repeat(1, repeats, 1)
        masks.append(mask if group.alike else mask.repeat_interleave(key_heads, 0))
        row, place = group.padding // tq, group.padding % tq
        padding.append(((row[:, None] * heads + head) * tq + place[:, None]).flatten())
    back = _inverse(queries, layout.num_queries * heads, padding)
    back_keys = _inverse(keys, layout.num_tokens * key_heads, None) if layout.flat else None
    plan = _Plan(tuple(queries), tuple(keys), tuple(masks), tuple(padding), back, back_keys)
    layout.plans[cache_key] = plan
    return plan


def _inverse(rows: list[Tensor], size: int, padding: list[Tensor] | None) -> Tensor:
    """Return the index of each row in the concatenated `rows`, without padding."""
    flat = torch.cat(rows)
    place = torch.arange(flat.shape[0], device=flat.device)
    if padding is not None:
        offsets = accumulate((part.shape[0] for part in rows), initial=0)
        dropped = [part + offset for part, offset in zip(padding, offsets, strict=False)]
        real = torch.ones_like(flat, dtype=torch.bool)
        real[torch.cat(dropped)] = False
        flat, place = flat[real], place[real]
    else:  # padded keys repeat the last token: reversed, its real index is written last
        flat, place = flat.flip(0), place.flip(0)
    return torch.zeros(size, dtype=torch.int64, device=flat.device).index_copy_(0, flat, place)
