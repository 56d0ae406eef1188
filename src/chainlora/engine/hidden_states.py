"""Hidden states of a packed batch, at the positions that are needed.

Two paths give the same numbers up to rounding. *packed* runs the one row through the model with an
attention that keeps sequences apart (`packed_attention`); *padded* is the plain reference: a
right-padded batch with an attention mask through the model's own forward. `choose_path` takes the
first only where a probe on the model itself shows that it computes the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.attention import LAYOUT, NAME, make_layout
from chainlora.engine.packing import PackedBatch, pack
from chainlora.models.modes import evaluation_mode, kept_random_state
from chainlora.models.text_config import base_model, compute_dtype, text_config

# A wrong packing (sequences that see each other) changes hidden states by some amount; the packed
# path must be nearer to the plain one than half that amount, whatever the dtype's rounding. And
# never further than this share of the norm, which two-byte formats stay far below over tens of
# layers.
_SHARE_OF_CONTAMINATION = 0.5
_LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_LARGEST_DIFFERENCE_TWO_BYTES = 0.25

_SETTING = Lock()
_RUNNING: WeakKeyDictionary[nn.Module, tuple[int, Any]] = (
    WeakKeyDictionary()
)  # forwards now, what was set before


class ForwardPath(StrEnum):
    """How a packed batch runs through a model."""

    PACKED = "packed"
    PADDED = "padded"


Path = ForwardPath  # until training/ uses the engine


def hidden_states(model: nn.Module, batch: PackedBatch, *, path: ForwardPath) -> Tensor:
    """Return the hidden states [R, d] at `batch.rows`, after the final norm, differentiable.

    A batch with a sequence longer than the model's sliding window takes the padded path whatever
    `path` says.
    """
    if path is ForwardPath.PACKED and batch.longest <= attention_window(model):
        return _packed_hidden(model, batch)
    return padded_hidden(model, batch)


def choose_path(model: nn.Module) -> ForwardPath:
    """Return the path that `why_not_packed` allows."""
    return ForwardPath.PACKED if why_not_packed(model) is None else ForwardPath.PADDED


def why_not_packed(model: nn.Module) -> str | None:
    """Return why the packed path does not compute what the plain one does, None where it does.

    Three short sequences, two of which share a prefix, go through both paths in the model's own
    dtype. Training flags and random state are left as they were.
    """
    try:
        with probing(model):
            return _why_not_packed(model)
    except Exception as error:  # whatever an architecture trips over, the plain path is right
        return f"{type(error).__name__}: {error}".splitlines()[0]


def attention_window(model: nn.Module) -> int:
    """Return how far back attention sees: the sliding window or chunk, or a number above any
    length."""
    config = text_config(model)
    limits = [
        getattr(config, "sliding_window", None),
        getattr(config, "attention_chunk_size", None),
    ]
    if getattr(config, "use_sliding_window", True) is False:
        limits = limits[1:]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=2**62)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout; put every training flag and the random state back."""
    with kept_random_state(model), torch.no_grad(), evaluation_mode(model):
        yield


def _why_not_packed(model: nn.Module) -> str | None:
    window = attention_window(model)
    if window < 12:
        return f"the attention window is {window} tokens"
    parameter = next(model.parameters())
    batch = _probe_batch(text_config(model)).to(parameter.device)
    plain = padded_hidden(model, batch).double()
    packed = _packed_hidden(model, batch).double()
    contaminated = _packed_hidden(model, batch, whole_row=True).double()
    norm = plain.norm().item()
    difference = (packed - plain).norm().item() / norm
    wrong = (contaminated - plain).norm().item() / norm
    largest = _LARGEST_DIFFERENCE.get(compute_dtype(model), _LARGEST_DIFFERENCE_TWO_BYTES)
    if difference < min(largest, _SHARE_OF_CONTAMINATION * wrong):
        return None
    return f"packed hidden states differ from plain ones by {difference:.2g} of their norm"


def _probe_batch(config: Any) -> PackedBatch:
    vocabulary = min(config.vocab_size, 50000)
    numbers = torch.randint(
        0, vocabulary, (30,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    first, second, third = numbers[:8], numbers[8:15], numbers[15:20]
    shared = (tuple(first + numbers[20:23]), tuple(first + numbers[23:27]))
    examples = [
        Example(0, shared, tuple(((2, len(s)),) for s in shared)),
        Example(1, (tuple(second),), (((1, 7),),)),
        Example(2, (tuple(third),), (((1, 5),),)),
    ]
    return pack(examples, min_shared=4)


def _packed_hidden(model: nn.Module, batch: PackedBatch, *, whole_row: bool = False) -> Tensor:
    with packed_implementation(base_model(model)):
        return packed_hidden(model, batch, whole_row=whole_row)


def packed_hidden(model: nn.Module, batch: PackedBatch, *, whole_row: bool = False) -> Tensor:
    """Return [R, d] of a model that is set to packed attention.

    `whole_row` makes one sequence of the row: the wrong result the probe compares with.
    """
    segments = batch.segments
    if whole_row:
        segments = (type(segments[0])(0, batch.num_tokens, -1),)
    output = base_model(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        # transformers takes a mask of four dimensions as it is, so none is built; packed
        # attention ignores it
        attention_mask=batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        **{LAYOUT: make_layout(segments, batch.input_ids.device, batch.rows)},
    )
    hidden = output.last_hidden_state[0]
    if hidden.shape[0] == batch.rows.shape[0]:  # the last layer computed these rows alone
        return hidden
    return hidden.index_select(0, batch.rows)


@contextmanager
def packed_implementation(base: nn.Module) -> Iterator[None]:
    """Set the attention implementation for one forward, or for several at a time in different
    threads.

    Under gradient checkpointing layers look it up again during backward, so there it stays set;
    calls without a layout then run transformers' SDPA.
    """
    config: Any = base.config
    with _SETTING:
        running, before = _RUNNING.get(base, (0, config._attn_implementation))
        _RUNNING[base] = (running + 1, before)
        if before != NAME:
            config._attn_implementation = NAME
    try:
        yield
    finally:
        checkpointed = any(
            getattr(module, "gradient_checkpointing", False) for module in base.modules()
        )
        again = checkpointed and torch.is_grad_enabled()
        with _SETTING:
            running, before = _RUNNING.pop(base)
            if running > 1:
                _RUNNING[base] = (running - 1, before)
            elif before != NAME and not again:
                config._attn_implementation = before


def padded_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [R, d] from one right-padded row per leaf of the prefix tree."""
    index, mask, place = _unpacked(batch)
    output = base_model(model)(
        input_ids=batch.input_ids[index], attention_mask=mask, use_cache=False
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, place)


def _unpacked(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
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
