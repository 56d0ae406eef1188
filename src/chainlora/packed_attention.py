"""Attention over a packed row: each token sees its own sequence and nothing else.

Registered with transformers under the name ``chainlora_packed``, so any architecture that looks its attention
up there can run packed. The layout of a batch is computed once and travels to every layer as a keyword
argument of the model's forward (and so survives gradient checkpointing, where layers run again during
backward). A call without a layout is transformers' own SDPA, mask included: a model left on this
implementation still generates and scores as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packing import Segment

NAME = "chainlora_packed"
LAYOUT = "packed_layout"
# What an architecture adds to attention by these arguments cannot be left out silently.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the trees of a packed row lie: their sizes, and the mask of those that branch.

    A tree without branches is one sequence and needs no mask, only causality.
    """

    sizes: tuple[int, ...]
    masks: tuple[Tensor | None, ...]  # [t, t] bool, True where the row's token may look at the column's


def make_layout(segments: Sequence[Segment], device: torch.device | str) -> Layout:
    """Compute the layout of a packed row, on `device`."""
    trees: list[list[int]] = []
    for index, segment in enumerate(segments):
        if segment.parent < 0:
            trees.append([])
        trees[-1].append(index)
    sizes, masks = [], []
    for tree in trees:
        sizes.append(segments[tree[-1]].end - segments[tree[0]].start)
        masks.append(_tree_mask(segments, tree).to(device) if len(tree) > 1 else None)
    return Layout(tuple(sizes), tuple(masks))


def _tree_mask(segments: Sequence[Segment], tree: list[int]) -> Tensor:
    origin = segments[tree[0]].start
    size = segments[tree[-1]].end - origin
    mask = torch.zeros(size, size, dtype=torch.bool)
    for index in tree:
        start, end, parent = segments[index]
        mask[start - origin : end - origin, start - origin : end - origin] = True
        while parent >= 0:
            first, last, above = segments[parent]
            mask[start - origin : end - origin, first - origin : last - origin] = True
            parent = above
    return mask.tril_()


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                     packed_layout: Layout | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attend within the trees of `packed_layout`; query, key, value [1, heads, T, head size] → [1, T, heads,
    size].

    Raises:
        NotImplementedError: the architecture asks for something this function does not compute.
    """
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, **kwargs)
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise NotImplementedError(f"packed attention does not compute {asked[0]}")
    groups = query.shape[1] // key.shape[1]
    parts = []
    pieces = (x.split(packed_layout.sizes, dim=2) for x in (query, key, value))
    for q, k, v, mask in zip(*pieces, packed_layout.masks, strict=True):
        if groups > 1:  # a view: key heads are shared, not copied
            q, k, v = q.unflatten(1, (-1, groups))[0], _share(k, groups), _share(v, groups)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                           scale=scaling)
        parts.append(out.flatten(0, 1)[None] if groups > 1 else out)
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _share(x: Tensor, groups: int) -> Tensor:
    return x[0][:, None].expand(-1, groups, -1, -1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
