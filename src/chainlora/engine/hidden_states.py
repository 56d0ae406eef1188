"""Hidden states of a packed batch, at the positions that are needed, by two paths.

*packed* runs the one row through a model that is set to packed attention, which keeps sequences
apart; *padded* is the plain reference: a right-padded batch with an attention mask through the
model's own forward. Where the probes of this room agree, both give the same numbers to rounding.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from chainlora.engine.attention import LAYOUT
from chainlora.engine.layout import make_layout
from chainlora.engine.packing import PackedBatch
from chainlora.models.text_config import base_model, text_config


class ForwardPath(StrEnum):
    """How a packed batch runs through a model."""

    PACKED = "packed"
    PADDED = "padded"


def packed_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [R, d] of a model that is set to packed attention."""
    device, dtype = batch.input_ids.device, next(model.parameters()).dtype
    layout = make_layout(batch.segments, device, dtype, batch.rows)
    output = base_model(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        # transformers takes a mask of four dimensions as it is, so none is built; packed
        # attention ignores it
        attention_mask=batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        **{LAYOUT: layout},
    )
    hidden = output.last_hidden_state[0]
    if hidden.shape[0] == batch.rows.shape[0]:  # the last layer computed these rows alone
        return hidden
    return hidden.index_select(0, batch.rows)


def padded_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [R, d] from one right-padded row per leaf of the prefix tree."""
    index, mask, place = unpacked(batch)
    pad = getattr(text_config(model), "pad_token_id", None) or 0  # some find padding by its token
    ids = torch.where(mask.bool(), batch.input_ids[index], pad)
    output = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, place)


def unpacked(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed positions by leaf [L, longest], their mask, and the place of each needed row
    [R]."""
    chains: list[list[int]] = []
    parents = {segment.parent for segment in batch.segments}
    for start, end, parent in batch.segments:
        chains.append((chains[parent] if parent >= 0 else []) + list(range(start, end)))
    leaves = [chain for i, chain in enumerate(chains) if i not in parents]
    longest = max(map(len, leaves))
    index = torch.tensor([chain + [0] * (longest - len(chain)) for chain in leaves])
    mask = torch.tensor([[1] * len(chain) + [0] * (longest - len(chain)) for chain in leaves])
    where = {
        position: leaf * longest + i
        for leaf, chain in enumerate(leaves)
        for i, position in enumerate(chain)
    }
    place = torch.tensor([where[row] for row in batch.rows.tolist()])
    device = batch.input_ids.device
    return index.to(device), mask.to(device), place.to(device)
