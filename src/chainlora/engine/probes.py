"""Probe a model: run plain transformers on about forty tokens to find its properties.

Fast paths need properties that most models have: a position does not see later positions, nothing
random is drawn, and a row does not depend on the longest row of its batch. Each property is tested
on the model itself, in float32, up to rounding.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.float32 import TWO_BYTES, computing_in_float32
from chainlora.engine.packing import PackedBatch, pack, padded_hidden
from chainlora.errors import ModelError, is_out_of_memory
from chainlora.models.modes import in_mode, kept_random_state
from chainlora.models.text_config import base_model, context_length, text_config

# Largest median change of states when later tokens change: rounding in float32, with a margin for
# experts in two bytes.
_CAUSAL, _CAUSAL_TWO_BYTES = 1e-4, 0.1
# Largest median change of a row between alone and padded: another mask changes it more, 8-bit
# activations less.
_ALONE = 0.05
UNLIMITED = 2**62
_FARTHEST = 2**20  # positions, for models without a context length
_SHORT_THRESHOLD = 128  # tokens; rows beyond a longer threshold would take long on a CPU


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout; restore training flags and generators at the end."""
    with kept_random_state(model), torch.no_grad(), in_mode(model):
        yield


Calls = dict[nn.Module, tuple[Tensor, dict[str, Any]]]


@dataclass
class Facts:
    """Results of probes, and how the model will be used; the input of fast paths' probes."""

    states: Tensor  # hidden states [N, d] of the unpacked `probe_batch`
    failure: str | None  # why they are not in float32, or None
    random: str | None  # why training draws random numbers, or None
    length: str | None  # what depends on the longest row of a batch, or None
    threshold: int  # longest row, in tokens, without such an effect
    is_trained: bool  # whether gradients are needed
    most_threads: int | None = None  # the caller's limit
    is_shared: bool = False  # whether weights are sharded over processes
    # modules whose packed calls are recorded, and the last packed call of each, in float32
    watched: list[nn.Module] = field(default_factory=list)
    calls: Calls = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)  # names of the paths applied so far


def examine(model: nn.Module, *, training: bool) -> Facts:
    """Probe a model; weights, modes, generators and config are unchanged on return.

    Raises:
        ModelError: the model does not run on token ids alone, is not causal, draws random numbers
            in evaluation, has states that are not finite, or rows that depend on other rows.
    """
    states, failure = _plain_states(model)
    drawn = random_in_training(model) if training else None
    forget_lengths(model)
    return Facts(states, failure, drawn, *length_dependence(model), is_trained=training)


# --- the reference: hidden states of plain transformers ---


def _plain_states(model: nn.Module) -> tuple[Tensor, str | None]:
    """Return the hidden states [N, d] of the unpacked probe, and why they are not in float32."""
    name = type(model).__name__
    if getattr(text_config(model), "attention_type", None) == "block_sparse":  # BigBird
        raise ModelError(
            "a row must not depend on earlier rows (got `attention_type: block_sparse` from "
            f"{name}, which a short row switches to full attention for good); set "
            "`attention_type: original_full` in its config.json"
        )
    batch = probe_batch(model, packed=False)
    failure = None
    with probing(model):
        before = _generator_states(model)
        try:
            with computing_in_float32(model):
                states, alone = _states(model, batch)
        except Exception as error:
            failure = f"it cannot be probed in float32 ({first_line(error)})"
            try:
                states, alone = _states(model, batch)
            except Exception as error:
                raise ModelError(
                    f"the model must run on token ids alone (got {first_line(error)} from {name}); "
                    "use a decoder-only text model"
                ) from error
        _run_past_short_thresholds(model)
        is_drawn = _generator_states(model) != before
    if is_drawn:
        raise ModelError(
            f"a model must give equal scores in every run (got {name}, which draws random numbers "
            "in evaluation); change its config, or use another model"
        )
    _check_states(name, batch, states, alone)
    return states, failure


def _check_states(name: str, batch: PackedBatch, states: Tensor, alone: Tensor) -> None:
    """Raise ModelError unless states [N, d] are finite, causal, and the same for a row alone."""
    if not torch.isfinite(states).all():
        raise ModelError(
            f"hidden states must be finite (got infinite or NaN from {name}); check the weights, "
            "or use dtype float32"
        )
    first, second = (states[batch.token_sequence == i][: _SHARED - 1] for i in (0, 1))
    allowed = _CAUSAL_TWO_BYTES if states.dtype in TWO_BYTES else _CAUSAL
    if relative_difference(first, second).median() > allowed:
        raise ModelError(
            f"the model must be causal (got {name}, whose positions see later tokens); use a "
            "decoder, or set `is_decoder` in its config if it was trained as one"
        )
    if relative_difference(states[batch.token_sequence == 0], alone).median() > _ALONE:
        raise ModelError(
            "a row must not depend on the other rows of its batch",
            f"{name}, with other states without padding",
            "change its config (`use_bidirectional_attention`), or use another model",
        )


def _run_past_short_thresholds(model: nn.Module) -> None:
    """Run one row beyond a short threshold of the config, if there is one.

    Hashed and block-sparse attention draw random numbers only beyond it.
    """
    longest = max(_LENGTHS)
    thresholds = [
        value
        for name, value in _integers(model)
        if longest < value <= _SHORT_THRESHOLD and _may_be_a_length(name)
    ]
    if thresholds and (length := 2 * max(thresholds) + 8) < context_length(model):
        ids = torch.ones((1, length), dtype=torch.int64, device=next(model.parameters()).device)
        base_model(model)(input_ids=ids, use_cache=False)


def _states(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states of every token [N, d], and of the first sequence run alone."""
    rows = batch.rows[batch.token_row[batch.token_sequence == 0]]
    ids = batch.input_ids[rows][None]
    alone = base_model(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return padded_hidden(model, batch), alone.last_hidden_state[0]


# --- the tokens that probes run ---


_SHARED = 6
_LENGTHS = (_SHARED + 3, _SHARED + 4, 6, 5)  # of the probe's sequences
FAR = 3  # index of the sequence at the end of the model's context


def probe_batch(model: nn.Module, *, packed: bool = True) -> PackedBatch:
    """Return two sequences with a common prefix and two others; every token is scored.

    Packed, the last sequence has positions at the end of the model's context, beyond every
    threshold. Otherwise each sequence starts at position 0.
    """
    vocabulary = min(int(text_config(model).vocab_size), 50_000)
    generator = torch.Generator().manual_seed(0)
    numbers = iter(torch.randint(0, vocabulary, (sum(_LENGTHS),), generator=generator).tolist())
    rows = [tuple(next(numbers) for _ in range(n)) for n in _LENGTHS]
    rows[1] = rows[0][:_SHARED] + rows[1][_SHARED:]
    examples = [Example(i, (row,), (((1, len(row)),),)) for i, row in enumerate(rows)]
    batch = pack(examples, share_prefixes=packed, min_shared=4)
    positions = batch.position_ids.clone()
    if packed:
        far = batch.rows[batch.token_row[batch.token_sequence == FAR]]
        positions[far] += max(min(context_length(model), _FARTHEST) - 2 * _LENGTHS[FAR], 0)
    return replace(batch, position_ids=positions).to(next(model.parameters()).device)


def relative_difference(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the relative difference of each row [R], on the CPU because MPS has no float64."""
    mine, theirs = mine.cpu().double(), theirs.cpu().double()
    return (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)


# --- random numbers, and dependence on other rows ---


def random_in_training(model: nn.Module) -> str | None:
    """Return text if the model draws random numbers in training mode, else None.

    Compares the states of generators. That detects dropout, router noise and skipped layers alike,
    without their names.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with kept_random_state(model), torch.no_grad(), in_mode(model, training=True):
            before = _generator_states(model)
            base_model(model)(input_ids=ids, use_cache=False)
            is_drawn = _generator_states(model) != before
    except Exception as error:
        return f"it may draw random numbers in training ({first_line(error)})"
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return "it draws random numbers in training (dropout, noise)" if is_drawn else None


def _generator_states(model: nn.Module) -> tuple[object, ...]:
    """Return the states of all generators from which a model can draw."""
    device = next(model.parameters()).device
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    others = random.getstate(), str(numpy.random.get_state())
    return *(state.numpy().tobytes() for state in states), *others


def length_dependence(model: nn.Module) -> tuple[str | None, int]:
    """Return what depends on the longest row of a batch, or None, and beyond which length.

    Dynamic and LongRoPE rotary embeddings use angles that depend on the longest position, so a long
    row changes the states of short rows in its batch.
    """
    settings = _settings(text_config(model).to_dict())
    kinds = {str(value) for name, value in settings if name == "rope_type"}
    kinds &= {"dynamic", "longrope"}
    if not kinds:
        return None, 0
    names = (_A_LENGTH, "max_position_embeddings")
    first = min((value for name, value in _integers(model) if name in names), default=0)
    return f"its rotary embedding ({min(kinds)}) changes with the longest row", first


def forget_lengths(model: nn.Module) -> None:
    """Reset dynamic rotary embeddings, which otherwise keep the frequencies of the longest row."""
    for module in model.modules():
        first: Any = getattr(module, "original_max_seq_len", None)
        for name in [] if first is None else [*vars(module), *module._buffers]:
            prefix = name.removesuffix("original_inv_freq")
            if prefix == name or getattr(module, f"{prefix}max_seq_len_cached", first) == first:
                continue
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, name).to(device).clone()
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", first)


def first_line(error: Exception) -> str:
    """Return the first line of an error; raise it again if it is out of memory."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# --- limits of packing from the model's config ---

# A probe runs about forty tokens, so it cannot see the effect of an attention window, a chunk or a
# number of selected keys beyond that. Windows and chunks limit a *sequence*: shorter ones are not
# masked. Any other integer of the config limits the packed *row*, unless its name shows that it is
# no length. So an unknown field can make a model slower, but never wrong.
_WINDOWS = {
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
}
# Fields that are no lengths: widths, counts, ids. The context length is no threshold either,
# because every token gets its own position.
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
    """Longest sequence and longest row that may be packed, in tokens."""

    sequence: int
    row: int
    row_field: str  # field of the config that limits the row


def packing_limits(model: nn.Module, probed: int) -> Limits:
    """Return the limits in a model's config that are beyond the `probed` number of tokens."""
    sequence, row, field = UNLIMITED, UNLIMITED, ""
    for name, value in _integers(model):
        if name in _WINDOWS and value > 0:
            sequence = min(sequence, value)
        elif probed < value < row and _may_be_a_length(name):
            row, field = value, name
    return Limits(sequence, row, field)


def _may_be_a_length(name: str) -> bool:
    return name == _A_LENGTH or not _NO_LENGTH.fullmatch(name)


def _integers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield name and value of every integer in a model's config."""
    for name, value in _settings(text_config(model).to_dict()):
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def _settings(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every entry of a config, also in nested tables and lists."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value)
        else:
            items = value if isinstance(value, list | tuple) else [value]
            yield from ((str(name), item) for item in items)
