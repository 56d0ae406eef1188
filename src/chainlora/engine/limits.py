"""How long sequences and rows may be before a model behaves in another way: read from its config.

A probe runs some forty tokens. What a model does past a window, a chunk or a number of keys it
picks shows only beyond that, so every number of the config that might be such a threshold limits
what is packed:

    windows and chunks of attention   the longest *sequence*; below it they mask nothing, and a
                                      packed sequence sees exactly its own tokens
    any other number                  the whole packed *row*, unless its name says that it counts
                                      something else (widths, heads, layers, token ids, …)

So a field that this package has never heard of makes a model slower, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from chainlora.models.text_config import text_config

UNLIMITED = 2**62

_WINDOWS = {
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
}
# Names of what is no length: widths, counts, ids, and the context itself, whose end is no threshold
# because every token is given its position.
_NO_LENGTH = re.compile(
    r"(num|n|d|dim)_\w+|hidden_size\w*|intermediate_size\w*|\w*vocab\w*|\w*(rope|emb)_theta"
    r"|(\w+_)?(hidden|inner|intermediate|embed\w*|ffn|expert|state|model|output|input|proj)_(size|dim)"
    r"|\w+_(dim|headdim|rank|heads|layers|head|id|ids|index|token|channels?|width|bits|base|groups)"
    r"|(image|video|audio|vision)_\w+|dim|dff|moe_num_experts|zero_expert_num|mamba_d_\w+"
    r"|query_pre_attn_scalar|codebook_size|scale_emb|\w*max_position_embeddings|\w+_positions"
    r"|max_seq_len|model_max_length|context_length|max_length|(\w+_)?factor|beta_fast|beta_slow"
)
_A_LENGTH = "original_max_position_embeddings"


class Limits(NamedTuple):
    """The longest sequence and the longest row that may be packed, in tokens."""

    sequence: int
    row: int
    row_field: str  # the field of the config that limits the row


def packing_limits(model: nn.Module, probed: int) -> Limits:
    """Return the limits that a model's config sets, beyond the `probed` tokens of a probe."""
    sequence, row, field = UNLIMITED, UNLIMITED, ""
    for name, value in _integers(text_config(model).to_dict()):
        if name in _WINDOWS and value > 0:
            sequence = min(sequence, value)
        elif probed < value < row and _may_be_a_length(name):
            row, field = value, name
    return Limits(sequence, row, field)


def short_threshold(model: nn.Module, probed: int, longest: int) -> int | None:
    """Return the largest number that may be a threshold, above `probed` and up to `longest`."""
    values = _integers(text_config(model).to_dict())
    found = [v for name, v in values if probed < v <= longest and _may_be_a_length(name)]
    return max(found, default=None)


def _may_be_a_length(name: str) -> bool:
    return name == _A_LENGTH or not _NO_LENGTH.fullmatch(name)


def _integers(values: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, value) of every integer of a config, those in nested tables and lists too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int) and not isinstance(each, bool):
                yield str(name), each
