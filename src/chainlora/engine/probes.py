"""What a model does, found by running it on some forty tokens against plain transformers.

Everything fast in this room rests on a property that many models have and some do not: that a
position sees nothing after it, that sequences side by side in one row do not see one another, that
nothing random is drawn. Each is asked of the model itself, in float32 at rounding tolerance,
through all its layers, at positions of the beginning and of the end of its context.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.attention import LAYOUT, packed_name
from chainlora.engine.float32 import computing_in_float32
from chainlora.engine.hidden_states import packed_hidden, padded_hidden
from chainlora.engine.limits import Limits, packing_limits, short_threshold
from chainlora.engine.packing import PackedBatch, pack
from chainlora.engine.patching import Patches
from chainlora.errors import ModelError
from chainlora.models.modes import evaluation_mode, kept_random_state, training_mode
from chainlora.models.shards import by_module
from chainlora.models.text_config import base_model, compute_dtype, context_length, text_config

# Of the norm of a hidden state. Packed and padded rows sum the same numbers in another order: some
# 1e-6 in float32 over thirty layers (norms are float32 in a float64 model too), with a margin for
# states that cancel. Another formula is off by a hundred times that.
_SAME = 1e-4
# A row whose neighbours change goes through the same operations on the same numbers. Experts alone
# see their tokens in groups of another size.
_UNTOUCHED = 1e-6
# A state whose later tokens differ, half of them at least: to rounding in float32, with room for
# experts in two bytes.
_CAUSAL, _CAUSAL_TWO_BYTES = 1e-4, 0.1
_FARTHEST = 2**20  # positions; for models that state no context
_SHORT_THRESHOLD = 128  # tokens; a row beyond a longer one would take long on a CPU
_SMALLEST_ROW = 1024  # tokens; a model that must stay below is not worth packing


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout; put every training flag and the random state back."""
    with kept_random_state(model), torch.no_grad(), evaluation_mode(model):
        yield


Calls = dict[nn.Module, tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Findings:
    """What a model was found to do."""

    packed: str | None  # why packing is not the same function; None where it is
    limits: Limits
    random: str | None  # what draws random numbers while it is trained
    length: str | None  # what depends on the longest row of a batch
    threshold: int  # tokens up to which it does not
    calls: Calls  # what the watched layers were called with in the packed row, in float32


def examine(
    model: nn.Module, *, training: bool, packing: bool, watch: Sequence[nn.Module] = ()
) -> Findings:
    """Probe a model; its weights, modes, random state and config are as before on return.

    Raises:
        ModelError: it does not run on token ids alone, is not causal, or is random in evaluation.
    """
    batch = probe_batch(model)
    limits = packing_limits(model, batch.longest)
    plain, failure = _plain_states(model)
    reason = failure if packing else "speedups are off"
    calls: Calls = {}
    if reason is None:
        with _recording(watch, calls):
            reason = _why_not_packed(model, batch, plain, limits)
    drawn = random_in_training(model) if training else None
    forget_lengths(model)
    return Findings(reason, limits, drawn, *length_dependence(model), calls)


@contextmanager
def _recording(layers: Sequence[nn.Module], calls: Calls) -> Iterator[None]:
    """Note the last packed call of each layer: its hidden states and its other arguments."""

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if LAYOUT in kwargs:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls[layer] = (args[0] if args else kwargs["hidden_states"], others)

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what plain transformers computes, and whether it can be scored at all ---


def _plain_states(model: nn.Module) -> tuple[Tensor, str | None]:
    """Return the hidden states of every token of the probe, each sequence by itself in a padded
    batch, and why they are not in float32, None where they are."""
    _refuse_block_sparse(model)
    batch = probe_batch(model, packed=False)
    failure = None
    with probing(model), _watching_generators(model) as drawn:
        try:
            with _computing_wide(model):
                states = padded_hidden(model, batch)
        except Exception as error:
            failure = f"it cannot be probed in float32 ({first_line(error)})"
            states = _padded_or_refused(model, batch)
        _run_past_short_thresholds(model)
    name = type(model).__name__
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
    two_bytes = states.dtype in (torch.bfloat16, torch.float16)
    if _relative(first, second).median() > (_CAUSAL_TWO_BYTES if two_bytes else _CAUSAL):
        raise ModelError(
            f"the model must be causal (got {name}, where a position sees the tokens after it); "
            "use a decoder, or set `is_decoder` in its config if it was trained as one"
        )
    return states, failure


def _refuse_block_sparse(model: nn.Module) -> None:
    """Raise ModelError for BigBird's attention, which is another function after a short row."""
    if getattr(text_config(model), "attention_type", None) == "block_sparse":
        raise ModelError(
            "a row must be computed alike whatever came before it (got `attention_type: "
            f"block_sparse` from {type(model).__name__}, which becomes full attention for good "
            "after a short row); set `attention_type: original_full` in its config.json"
        )


def _run_past_short_thresholds(model: nn.Module) -> None:
    """Run one row beyond a threshold of up to 128 tokens: hashed and block-sparse attention of
    that size draw random numbers only there."""
    threshold = short_threshold(model, max(_LENGTHS), _SHORT_THRESHOLD)
    if threshold is not None and (length := 2 * threshold + 8) < context_length(model):
        ids = torch.ones((1, length), dtype=torch.int64, device=next(model.parameters()).device)
        base_model(model)(input_ids=ids, use_cache=False)


def _padded_or_refused(model: nn.Module, batch: PackedBatch) -> Tensor:
    try:
        return padded_hidden(model, batch)
    except Exception as error:
        raise ModelError(
            f"the model must run on token ids alone (got {first_line(error)} from "
            f"{type(model).__name__}); use a decoder-only text model"
        ) from error


# --- sequences side by side do not see one another ---


def _why_not_packed(
    model: nn.Module, batch: PackedBatch, plain: Tensor, limits: Limits
) -> str | None:
    """Compare the packed row with `plain`, the states of every token in a padded batch."""
    if limits.sequence < batch.longest:
        return f"its attention window is {limits.sequence} tokens"
    if limits.row < _SMALLEST_ROW:
        return (
            f"it may behave in another way beyond {limits.row} tokens (`{limits.row_field}` in its "
            "config)"
        )
    patches = Patches()
    try:
        with probing(model), _computing_wide(model):
            far = _at_far_positions(model, batch)
            patches.set_attention(base_model(model), packed_name)
            packed = packed_hidden(model, batch)
            disturbed = packed_hidden(model, _disturbed(batch))
    except Exception as error:  # whatever an architecture trips over, the plain path is right
        return f"it does not run packed ({first_line(error)})"
    finally:
        patches.restore()
    untouched = _untouched_rows(batch)
    if not _relative(disturbed[untouched], packed[untouched]).max() <= _UNTOUCHED:
        return "its layers mix tokens of neighbouring sequences"
    by_token = packed[batch.token_row]
    expected = torch.where((batch.token_sequence == _FAR)[:, None], far, plain)
    if not (difference := _relative(by_token, expected).max().item()) <= _SAME:
        return f"hidden states would differ by {difference:.1g} of their norm"
    return None


def _computing_wide(model: nn.Module) -> Any:
    two_bytes = compute_dtype(model) in (torch.bfloat16, torch.float16)
    return computing_in_float32(model) if two_bytes and not by_module(model) else nullcontext()


def _at_far_positions(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return [N, d], filled for the tokens of the last sequence: plain transformers, told where
    they stand."""
    tokens = batch.token_sequence == _FAR
    places = batch.rows[batch.token_row[tokens]]
    ids, positions = batch.input_ids[places][None], batch.position_ids[places][None]
    output = base_model(model)(input_ids=ids, position_ids=positions, use_cache=False)
    states = output.last_hidden_state[0]
    return states.new_zeros(len(tokens), states.shape[-1]).index_put((tokens,), states)


_SHARED = 6
_LENGTHS = (_SHARED + 3, _SHARED + 4, 6, 5)  # of the probe's sequences
_FAR = 3  # the one that ends where the model's context does


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
        far = batch.rows[batch.token_row[batch.token_sequence == _FAR]]
        positions[far] += max(min(context_length(model), _FARTHEST) - 2 * _LENGTHS[_FAR], 0)
    return replace(batch, position_ids=positions).to(next(model.parameters()).device)


def _disturbed(batch: PackedBatch) -> PackedBatch:
    """Return the batch with other tokens in its second branch and its third sequence."""
    changed = torch.ones_like(batch.input_ids, dtype=torch.bool)
    changed[batch.rows[_untouched_rows(batch)]] = False
    ids = torch.where(changed, batch.input_ids.flip(0).roll(1), batch.input_ids)
    return replace(batch, input_ids=ids)


def _untouched_rows(batch: PackedBatch) -> Tensor:
    """Return which of the R rows belong to the first and the last sequence."""
    kept = (batch.token_sequence == 0) | (batch.token_sequence == _FAR)
    rows = torch.zeros_like(batch.rows, dtype=torch.bool)
    rows[batch.token_row[kept]] = True
    return rows


def _relative(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the difference of each row, of the norm of the row."""
    return (mine - theirs).double().norm(dim=-1) / theirs.double().norm(dim=-1)


# --- nothing random is drawn, nothing depends on the rest of the batch ---


def random_in_training(model: nn.Module) -> str | None:
    """Return that the model draws random numbers in training mode, whatever for; None if not.

    Dropout, noise on a router and skipped layers all take from a generator, and that is what is
    looked at: not names.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with kept_random_state(model), torch.no_grad(), training_mode(model):  # noqa: SIM117
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
    before = _generator_states(device)
    drawn: list[str] = []
    yield drawn
    after = _generator_states(device)
    drawn += [name for name in before if before[name] != after[name]]


def _generator_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": str(numpy.random.get_state()),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def length_dependence(model: nn.Module) -> tuple[str | None, int]:
    """Return what in the model depends on the longest row of a batch (None if nothing), and from
    how many tokens on.

    Dynamic and LongRoPE rotary embeddings turn by angles that the longest position decides, so a
    short row is computed differently beside a long one.
    """
    config = text_config(model).to_dict()
    found = sorted({"dynamic", "longrope"} & set(map(str, _values(config, "rope_type"))))
    if not found:
        return None, 0
    thresholds = [
        *_values(config, "original_max_position_embeddings"),
        *_values(config, "max_position_embeddings"),
    ]
    first = min((value for value in thresholds if isinstance(value, int)), default=0)
    return f"its rotary embedding ({found[0]}) changes with the longest row", first


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic rotary embeddings forget the longest row so far, which they would go on using."""
    for module in model.modules():
        for name in [n for n in vars(module) if n.endswith("original_inv_freq")]:
            _restart_rotary(module, name.removesuffix("original_inv_freq"))
        for name in [n for n in module._buffers if n.endswith("original_inv_freq")]:
            _restart_rotary(module, name.removesuffix("original_inv_freq"))


def _restart_rotary(module: Any, prefix: str) -> None:
    first = getattr(module, "original_max_seq_len", None)
    if first is None or getattr(module, f"{prefix}max_seq_len_cached", first) == first:
        return
    frequencies = getattr(module, f"{prefix}inv_freq")
    original = getattr(module, f"{prefix}original_inv_freq").to(frequencies.device)
    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", first)


def _values(tree: Any, name: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from _values(value, name)


def first_line(error: Exception) -> str:
    """Return what an error says, short enough for a sentence."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
