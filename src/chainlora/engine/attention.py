"""Attention over a packed row: each token sees its own sequence and nothing else.

Registered with transformers under the name ``chainlora_packed``, so any architecture that looks its
attention up there can run packed. The layout of a batch is computed once and travels to every layer
as a keyword argument of the model's forward (and so survives gradient checkpointing, where layers
run again during backward). A call without a layout is the implementation that the model had before,
mask included: a model set to ours still generates and scores as before.

A segment's queries see the keys of its ancestors and its own up to themselves. Segments of like
shape are gathered into one padded batch of small attentions. On a CPU these are plain matmuls
(torch's fused kernel needs five times as long for the backward of a short bfloat16 sequence);
elsewhere, for long sequences, and under dropout, SDPA.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chainlora.engine.bf16_matmul import is_slow
from chainlora.engine.packing import Segment

NAME = "chainlora_packed"
LAYOUT = "packed_layout"
LONGEST_BY_MATMUL = (
    1024  # beyond, the scores of one sequence leave every cache and SDPA's blocks win
)
KEYS_MULTIPLE = (
    16  # whole vector registers: a bfloat16 softmax over 85 keys takes longer than over 96
)
LONGEST_KEPT = (
    384  # beyond, probabilities are made again in backward: kept, they would outweigh all else
)
# What an architecture adds to attention by these arguments cannot be left out silently.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
# Fixed cost of one batch of attentions, in scores (queries × keys) of one head: about 25 small
# calls.
_CALL_COST = {"cpu": 1_000}
_CALL_COST_ELSEWHERE = 200_000


class CannotPackError(Exception):
    """Attention of a kind that a packed row does not have."""


@dataclass(frozen=True, slots=True)
class Group:
    """Segments gathered into one batch: B rows of `queries` and `keys` packed positions, padded.

    Key j is the j-th token of the sequence; query i is its token ``depth[b, i]``, and so sees keys
    j ≤ that. Padded keys lie behind every real query; padded queries are dropped on the way out.
    """

    queries: Tensor  # [B, Tq]
    keys: Tensor  # [B, Tk]
    depth: Tensor  # [B, Tq]
    padding: Tensor  # places of padded queries among B · Tq
    causal: bool  # query i is token i of every row

    def visible(self) -> Tensor:
        """Return which keys each query sees, bool [B, Tq, Tk], or [1, Tq, Tk] where all rows
        agree."""
        depth = self.depth[:1] if self.causal else self.depth
        return torch.arange(self.keys.shape[1], device=depth.device) <= depth[:, :, None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions of the packed row [R], and the layout that has queries at these alone."""

    index: Tensor
    layout: Layout


@dataclass(frozen=True, slots=True)
class Layout:
    """How the attention of a packed row of `num_tokens` is computed; `plans` fills up as head
    counts are met."""

    groups: tuple[Group, ...]
    num_queries: int
    num_tokens: int
    longest: int
    flat: bool  # every token is a key of one group
    rows: Rows | None = None  # for a last layer of which only some positions are used
    plans: dict[Any, Any] = field(default_factory=dict)


def make_layout(
    segments: Sequence[Segment], device: torch.device | str, rows: Tensor | None = None
) -> Layout:
    """Compute the layout of a packed row, on `device`; with `rows` (ascending), also that of these
    positions alone."""
    paths: list[list[int]] = []  # packed positions of the whole sequence up to a segment's end
    for start, end, parent in segments:
        paths.append((paths[parent] if parent >= 0 else []) + list(range(start, end)))
    num_tokens = segments[-1].end
    whole = [
        _Unit(range(start, end), range(len(path) - (end - start), len(path)), path)
        for (start, end, _), path in zip(segments, paths, strict=True)
    ]
    trimmed = None
    if rows is not None and rows.shape[0] < num_tokens:
        trimmed = Rows(
            rows,
            _layout(_row_units(segments, paths, rows.tolist()), rows.shape[0], num_tokens, device),
        )
    return _layout(whole, num_tokens, num_tokens, device, trimmed)


class _Unit(NamedTuple):
    queries: Sequence[int]  # their place among all queries
    depths: Sequence[int]  # their place in the sequence
    keys: list[int]


def _row_units(segments: Sequence[Segment], paths: list[list[int]], rows: list[int]) -> list[_Unit]:
    units = []
    for (start, end, _), path in zip(segments, paths, strict=True):
        low, high = bisect_left(rows, start), bisect_left(rows, end)
        if low < high:
            first = len(path) - (end - start) - start
            depths = [first + row for row in rows[low:high]]
            units.append(_Unit(range(low, high), depths, path[: depths[-1] + 1]))
    return units


def _layout(
    units: list[_Unit],
    num_queries: int,
    num_tokens: int,
    device: torch.device | str,
    rows: Rows | None = None,
) -> Layout:
    cost = _CALL_COST.get(torch.device(device).type, _CALL_COST_ELSEWHERE)
    groups = []
    for causal in (True, False):
        mine = [u for u in units if (len(u.queries) == len(u.keys)) == causal]
        mine.sort(key=lambda u: (len(u.queries), len(u.keys)))
        for low, high in _partition([(len(u.queries), len(u.keys)) for u in mine], cost):
            groups.append(_group(mine[low:high], causal, device))
    longest = max(len(unit.keys) for unit in units)
    flat = sum(len(unit.keys) for unit in units) == num_tokens
    return Layout(tuple(groups), num_queries, num_tokens, longest, flat, rows)


def _partition(shapes: list[tuple[int, int]], call_cost: int) -> list[tuple[int, int]]:
    """Cut sorted (queries, keys) into runs so that calls and padding together cost least."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for high in range(1, len(shapes) + 1):
        options = []
        keys = 0
        for low in range(high - 1, -1, -1):
            keys = max(keys, shapes[low][1])
            padded = (high - low) * shapes[high - 1][0] * keys
            options.append((best[low][0] + call_cost + padded, low))
            if padded > options[0][0] - best[high - 1][0] + call_cost * (high - low):
                break  # already dearer than one call each
        best.append(min(options))
    cuts, high = [], len(shapes)
    while high:
        cuts.append((best[high][1], high))
        high = best[high][1]
    return cuts[::-1]


def _group(units: list[_Unit], causal: bool, device: torch.device | str) -> Group:
    tq = max(len(unit.queries) for unit in units)
    tk = -(-max(len(unit.keys) for unit in units) // KEYS_MULTIPLE) * KEYS_MULTIPLE
    queries, keys, depths = [], [], []
    padding: list[int] = []
    for b, unit in enumerate(units):
        missing = tq - len(unit.queries)
        queries.append([*unit.queries, *[unit.queries[0]] * missing])
        depths.append([*unit.depths, *(unit.depths[-1] + 1 + i for i in range(missing))])
        keys.append([*unit.keys, *[unit.keys[-1]] * (tk - len(unit.keys))])
        padding += range(b * tq + len(unit.queries), (b + 1) * tq)
    tensors = [
        torch.tensor(x, dtype=torch.int64, device=device) for x in (queries, keys, depths, padding)
    ]
    return Group(tensors[0], tensors[1], tensors[2], tensors[3], causal)


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
    if is_slow(query):
        mixed = attend(query.float(), key.float(), value.float(), layout, scaling, dropout)
        return mixed.to(query.dtype)
    if query.device.type == "cpu" and not dropout and layout.longest <= LONGEST_BY_MATMUL:
        return _MatmulAttention.apply(query, key, value, layout, scaling)
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
        mask = None if group.causal else group.visible()[:, None]
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=group.causal, scale=scaling, dropout_p=dropout
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[_plan(layout, 1, 1, query.dtype).back]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Row indices for given head counts: tensors are seen as rows (token, head) of one head's
    size."""

    queries: tuple[Tensor, ...]  # by group: rows of the query in the order (b, key head, repeat, i)
    keys: tuple[Tensor, ...]  # by group: rows of key and value in the order (b, key head, j)
    masks: tuple[Tensor, ...]  # by group: 0 or -inf, [1 or B · key heads, repeats · Tq, Tk]
    padding: tuple[Tensor, ...]  # by group: rows of padded queries in the above order
    back: Tensor  # where each query row lies in the groups' results laid end to end
    back_keys: Tensor | None  # the same for key rows, where each lies in one group only


def _plan(layout: Layout, heads: int, key_heads: int, dtype: torch.dtype) -> _Plan:
    wanted = (heads, key_heads, dtype)
    if wanted not in layout.plans:
        layout.plans[wanted] = _make_plan(layout, heads, key_heads, dtype)
    return layout.plans[wanted]


def _make_plan(layout: Layout, heads: int, key_heads: int, dtype: torch.dtype) -> _Plan:
    device = layout.groups[0].queries.device
    repeats = heads // key_heads
    head, key_head = torch.arange(heads, device=device), torch.arange(key_heads, device=device)
    queries, keys, masks, padding = [], [], [], []
    for group in layout.groups:
        (b, tq), tk = group.queries.shape, group.keys.shape[1]
        queries.append((group.queries[:, None, :] * heads + head[:, None]).flatten())
        keys.append((group.keys[:, None, :] * key_heads + key_head[:, None]).flatten())
        mask = torch.zeros(1 if group.causal else b, tq, tk, dtype=dtype, device=device)
        mask.masked_fill_(~group.visible(), float("-inf"))
        mask = mask.repeat(1, repeats, 1)
        masks.append(mask if group.causal else mask.repeat_interleave(key_heads, 0))
        row, place = group.padding // tq, group.padding % tq
        padding.append(((row[:, None] * heads + head) * tq + place[:, None]).flatten())
    back = _inverse(queries, layout.num_queries * heads, padding)
    back_keys = _inverse(keys, layout.num_tokens * key_heads, None) if layout.flat else None
    return _Plan(tuple(queries), tuple(keys), tuple(masks), tuple(padding), back, back_keys)


def _inverse(rows: list[Tensor], size: int, padding: list[Tensor] | None) -> Tensor:
    """Return for each row where it lies in `rows` laid end to end, padded places not counted."""
    flat = torch.cat(rows)
    place = torch.arange(flat.shape[0], device=flat.device)
    if padding is not None:
        offsets = [0]
        for part in rows:
            offsets.append(offsets[-1] + part.shape[0])
        real = torch.ones_like(flat, dtype=torch.bool)
        real[torch.cat([part + offset for part, offset in zip(padding, offsets, strict=False)])] = (
            False
        )
        flat, place = flat[real], place[real]
    else:  # padded keys repeat a last token, whose first place is the real one: write it last
        flat, place = flat.flip(0), place.flip(0)
    return torch.zeros(size, dtype=torch.int64, device=flat.device).index_copy_(0, flat, place)


class _MatmulAttention(torch.autograd.Function):
    """softmax(s·Q Kᵀ + mask) V by batched matmuls; heads that share a key head are one matmul."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
    ) -> Tensor:
        plan = _plan(layout, query.shape[1], key.shape[1], query.dtype)
        rows = [x.reshape(-1, x.shape[-1]) for x in (query, key, value)]
        parts, kept = [], []
        for i in range(len(layout.groups)):
            q, k, v = _gather(rows, plan, i, key.shape[1], layout)
            p = torch.softmax(torch.baddbmm(plan.masks[i], q, k.transpose(1, 2), alpha=scaling), -1)
            parts.append(torch.bmm(p, v).flatten(0, 1))
            kept.append(p if k.shape[1] <= LONGEST_KEPT and any(ctx.needs_input_grad[:3]) else None)
        ctx.save_for_backward(*rows, *kept)
        ctx.plan, ctx.layout, ctx.scaling = plan, layout, scaling
        ctx.shapes = query.shape, key.shape, value.shape
        return torch.cat(parts).index_select(0, plan.back).view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing counts
        rows, kept = list(saved[:3]), saved[3:]
        plan, layout = ctx.plan, ctx.layout
        query_shape, key_shape, value_shape = ctx.shapes
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        parts: list[list[Tensor]] = [[], [], []]
        for i in range(len(layout.groups)):
            q, k, v = _gather(rows, plan, i, key_shape[1], layout)
            g = grad.index_select(0, plan.queries[i])
            if plan.padding[i].numel():
                g.index_fill_(0, plan.padding[i], 0.0)
            g = g.view(*q.shape[:-1], g.shape[-1])
            p = kept[i]
            if p is None:
                p = torch.softmax(
                    torch.baddbmm(plan.masks[i], q, k.transpose(1, 2), alpha=ctx.scaling), -1
                )
            parts[2].append(torch.bmm(p.transpose(1, 2), g).flatten(0, 1))
            scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            parts[0].append(torch.bmm(scores, k).flatten(0, 1))
            parts[1].append(torch.bmm(scores.transpose(1, 2), q).flatten(0, 1))
        grad_query = torch.cat(parts[0]).index_select(0, plan.back).mul_(ctx.scaling)
        grad_key = _to_keys(parts[1], plan, key_shape).mul_(ctx.scaling)
        grad_value = _to_keys(parts[2], plan, value_shape)
        return grad_query.view(query_shape), grad_key, grad_value, None, None


def _gather(
    rows: list[Tensor], plan: _Plan, i: int, key_heads: int, layout: Layout
) -> list[Tensor]:
    batch = layout.groups[i].queries.shape[0] * key_heads
    q = rows[0].index_select(0, plan.queries[i])
    k, v = (x.index_select(0, plan.keys[i]) for x in rows[1:])
    return [x.view(batch, -1, x.shape[-1]) for x in (q, k, v)]


def _to_keys(parts: list[Tensor], plan: _Plan, shape: torch.Size) -> Tensor:
    """Bring gradients of gathered keys back to [T, key heads, size]; a key seen by several segments
    sums them."""
    whole = torch.cat(parts)
    if plan.back_keys is not None:
        return whole.index_select(0, plan.back_keys).view(shape)
    # summed in float32: a shared passage has many terms
    total = whole.new_zeros(
        (shape[0] * shape[1], shape[2]), dtype=torch.promote_types(whole.dtype, torch.float32)
    )
    return (
        total.index_add_(0, torch.cat(plan.keys), whole.to(total.dtype)).to(whole.dtype).view(shape)
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
