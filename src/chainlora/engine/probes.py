"""What a model does, found by running it on some forty tokens of plain transformers.

Everything fast rests on a property that many models have and some do not: that a position sees
nothing after it, that nothing random is drawn, that a row does not depend on the longest one of its
batch. Each is asked of the model itself, in float32 at rounding tolerance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from chainlora.models.text_config import base_model, compute_dtype, context_length, text_config

# A state whose later tokens differ, half of them at least: to rounding in float32, with room for
# experts in two bytes.
_CAUSAL, _CAUSAL_TWO_BYTES = 1e-4, 0.1
_ALONE = 0.05  # of a row beside others: another mask moves it more, 8-bit activations less
UNLIMITED = 2**62
_FARTHEST = 2**20  # positions; for models that state no context
_SHORT_THRESHOLD = 128  # tokens; a row beyond a longer one would take long on a CPU


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout; put every training flag and the random state back."""
    with kept_random_state(model), torch.no_grad(), in_mode(model):
        yield


Calls = dict[nn.Module, tuple[Tensor, dict[str, Any]]]


@dataclass
class Facts:
    """What fast paths are told: how the model is to run, and what probes found."""

    states: Tensor  # hidden states [N, d] of `probe_batch`, each sequence by itself
    failure: str | None  # why those are not in float32; None where they are
    random: str | None  # what draws random numbers while it is trained
    length: str | None  # what depends on the longest row of a batch
    threshold: int  # tokens up to which it does not
    is_trained: bool  # gradients will be asked for
    most_threads: int | None = None  # that the caller allows
    is_shared: bool = False  # each process holds a part of the weights
    watched: list[nn.Module] = field(default_factory=list)  # whose packed calls are noted
    calls: Calls = field(default_factory=dict)  # their last ones, in float32
    taken: list[str] = field(default_factory=list)  # names of the paths that were applied so far


def examine(model: nn.Module, *, training: bool) -> Facts:
    """Probe a model; its weights, modes, random state and config are as before on return.

    Raises:
        ModelError: it does not run on token ids alone, is not causal, or is random in evaluation.
    """
    states, failure = _plain_states(model)
    drawn = random_in_training(model) if training else None
    forget_lengths(model)
    return Facts(states, failure, drawn, *length_dependence(model), is_trained=training)


# --- what plain transformers computes, and whether it can be scored at all ---


def _plain_states(model: nn.Module) -> tuple[Tensor, str | None]:
    """Return the hidden states of every token of the probe, each sequence by itself in a padded
    batch, and why they are not in float32, None where they are."""
    name = type(model).__name__
    if getattr(text_config(model), "attention_type", None) == "block_sparse":  # BigBird
        raise ModelError(
            "a row must be computed alike whatever came before it (got `attention_type: "
            f"block_sparse` from {name}, which becomes full attention for good after a short row); "
            "set `attention_type: original_full` in its config.json"
        )
    batch = probe_batch(model, packed=False)
    failure = None
    with probing(model), _watching_generators(model) as drawn:
        try:
            with computing_wide(model):
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
    if drawn:
        raise ModelError(
            f"a model must give the same scores twice (got {name}, which draws random numbers in "
            "evaluation); configure it without, or use another"
        )
    if not torch.isfinite(states).all():
        raise ModelError(
            f"hidden states must be finite (got others from {name}); the weights or their dtype "
            "are at fault, try float32"
        )
    first, second = (states[batch.token_sequence == i][: _SHARED - 1] for i in (0, 1))
    allowed = _CAUSAL_TWO_BYTES if states.dtype in TWO_BYTES else _CAUSAL
    if relative_difference(first, second).median() > allowed:
        raise ModelError(
            f"the model must be causal (got {name}, where a position sees the tokens after it); "
            "use a decoder, or set `is_decoder` in its config if it was trained as one"
        )
    if relative_difference(states[batch.token_sequence == 0], alone).median() > _ALONE:
        raise ModelError(
            "a row must be computed alike whatever is beside it",
            f"{name}, for which it is another one where nothing is padded",
            "configure it otherwise (`use_bidirectional_attention`), or use another",
        )
    return states, failure


def _run_past_short_thresholds(model: nn.Module) -> None:
    """Run one row beyond a threshold of up to 128 tokens: hashed and block-sparse attention of
    that size draw random numbers only there."""
    longest = max(_LENGTHS)
    thresholds = [
        value
        for name, value in _integers(text_config(model).to_dict())
        if longest < value <= _SHORT_THRESHOLD and _may_be_a_length(name)
    ]
    if thresholds and (length := 2 * max(thresholds) + 8) < context_length(model):
        ids = torch.ones((1, length), dtype=torch.int64, device=next(model.parameters()).device)
        base_model(model)(input_ids=ids, use_cache=False)


def _states(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states of every token, and those of the first sequence by itself."""
    rows = batch.rows[batch.token_row[batch.token_sequence == 0]]
    ids = batch.input_ids[rows][None]
    alone = base_model(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return padded_hidden(model, batch), alone.last_hidden_state[0]


# --- the tokens that probes run ---


_SHARED = 6
_LENGTHS = (_SHARED + 3, _SHARED + 4, 6, 5)  # of the probe's sequences
FAR = 3  # the one that ends where the model's context does


def probe_batch(model: nn.Module, *, packed: bool = True) -> PackedBatch:
    """Return two sequences with a common beginning and two more, every token scored.

    Packed, the last one stands where the model's context ends, past every threshold of positions;
    else each is by itself, from position 0.
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
    """Return each row's difference relative to its norm, on the CPU: MPS has no float64."""
    mine, theirs = mine.cpu().double(), theirs.cpu().double()
    return (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)


def computing_wide(model: nn.Module) -> Any:
    """Return a context in which a model of two-byte weights computes in float32."""
    two_bytes = compute_dtype(model) in TWO_BYTES
    return computing_in_float32(model) if two_bytes else nullcontext()


# --- nothing random is drawn, nothing depends on the rest of the batch ---


def random_in_training(model: nn.Module) -> str | None:
    """Return that the model draws random numbers in training mode, whatever for; None if not.

    Dropout, noise on a router and skipped layers all take from a generator, and that is what is
    looked at: not names.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with kept_random_state(model), torch.no_grad(), in_mode(model, training=True):  # noqa: SIM117
            with _watching_generators(model) as drawn:
                base_model(model)(input_ids=ids, use_cache=False)
    except Exception as error:
        return f"it may draw random numbers in training ({first_line(error)})"
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return "it draws random numbers in training (dropout, noise)" if drawn else None


@contextmanager
def _watching_generators(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that names, at the end, the generators that were drawn from."""
    device = next(model.parameters()).device

    def states() -> dict[str, Any]:
        found: dict[str, Any] = {
            "torch": torch.random.get_rng_state().numpy().tobytes(),
            "random": random.getstate(),
            "numpy": str(numpy.random.get_state()),
        }
        if device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
        return found

    drawn: list[str] = []
    before = states()
    yield drawn
    after = states()
    drawn += [name for name in before if before[name] != after[name]]


def length_dependence(model: nn.Module) -> tuple[str | None, int]:
    """Return what depends on the longest row of a batch (None: nothing), and from which length.

    Dynamic and LongRoPE rotary embeddings turn by angles that the longest position decides, so a
    short row is computed differently beside a long one.
    """
    config = text_config(model).to_dict()
    found = sorted({"dynamic", "longrope"} & set(map(str, _values(config, "rope_type"))))
    if not found:
        return None, 0
    names = _A_LENGTH, "max_position_embeddings"
    values = (value for name in names for value in _values(config, name))
    first = min((value for value in values if isinstance(value, int)), default=0)
    return f"its rotary embedding ({found[0]}) changes with the longest row", first


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic rotary embeddings forget the longest row so far, which they would go on using."""
    for module in model.modules():
        first: Any = getattr(module, "original_max_seq_len", None)
        for name in [] if first is None else [*vars(module), *module._buffers]:
            prefix, found, after = name.rpartition("original_inv_freq")
            if not found or after or getattr(module, f"{prefix}max_seq_len_cached", first) == first:
                continue
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, name).to(device).clone()
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", first)


def _values(tree: Any, name: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from _values(value, name)


def first_line(error: Exception) -> str:
    """Return an error's first line; raise it again if memory ran out, which is not the model's."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# --- lengths from which a model may behave in another way, by its config ---

# A probe runs some forty tokens. What a model does past a window, a chunk or a number of keys it
# picks shows only beyond that. So windows and chunks of attention limit a *sequence*: below it they
# mask nothing. Any other number limits the whole packed *row*, unless its name says that it counts
# something else: a field that this package has never heard of makes a model slower, never wrong.
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
