"""The plain way to hidden states: a right-padded batch through the model's own forward.

Every fast path is held to this one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chainlora.engine.packing import PackedBatch, paths
from chainlora.models.text_config import base_model, text_config


def padded_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [R, d] at `batch.rows`, from one right-padded row per leaf of the prefix tree."""
    index, mask, place = unpacked(batch)
    # some find padding by its token; others say -1 for none
    pad = max(getattr(text_config(model), "pad_token_id", None) or 0, 0)
    ids = torch.where(mask.bool(), batch.input_ids[index], pad)
    output = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, place)


def unpacked(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed positions by leaf [L, longest], their mask, and the place of each needed row
    [R]."""
    parents = {segment.parent for segment in batch.segments}
    leaves = [path for i, path in enumerate(paths(batch.segments)) if i not in parents]
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
