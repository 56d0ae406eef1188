"""The packed path: one row of several sequences, which attention keeps separate.

Its probe compares hidden states with plain transformers in float32, through all layers, at
positions at the start and at the end of the model's context. It also changes neighbouring
sequences: the states of a sequence must not change with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.engine.fast_path import PACKED, FastPath
from chainlora.engine.float32 import computing_in_float32
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import Patches
from chainlora.engine.probes import (
    FAR,
    UNLIMITED,
    Calls,
    Facts,
    Limits,
    first_line,
    forget_lengths,
    packing_limits,
    probe_batch,
    probing,
    relative_difference,
)
from chainlora.models.text_config import base_model
from chainlora_fast.packed_attention import LAYOUT, CannotPackError, packed_name
from chainlora_fast.packed_layout import make_layout

# Largest relative difference of a hidden state. Packed and padded rows add the same numbers in
# another order: about 1e-6 in float32 over thirty layers, with a margin for states that cancel. A
# wrong formula differs by a hundred times this tolerance.
_SAME = 1e-4
# If its neighbours change, a sequence goes through the same operations on the same numbers; only
# experts get groups of tokens of another size.
_UNTOUCHED = 1e-6
_SMALLEST_ROW = 1024  # tokens; packing into shorter rows does not pay


class PackedSequences(FastPath):
    """Packs the sequences of a batch into one row: no padding, each common prefix once."""

    name = PACKED
    limits = Limits(UNLIMITED, UNLIMITED, "")

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why packing changes hidden states, or None; record calls of watched layers."""
        if facts.failure is not None:
            return facts.failure
        batch = probe_batch(model)
        self.limits = limits = packing_limits(model, batch.longest)
        self.longest_row = limits.row
        if limits.sequence < batch.longest:
            return f"its attention window is {limits.sequence} tokens"
        if limits.row < _SMALLEST_ROW:
            return (
                f"it may compute another function beyond {limits.row} tokens "
                f"(`{limits.row_field}` in its config)"
            )
        with _recording(facts.watched, facts.calls):
            reason = _why_not_packed(model, batch, facts.states)
        forget_lengths(model)
        return reason

    def apply(self, model: nn.Module) -> None:
        self.patches.set_attention(base_model(model), packed_name)

    def note(self, reason: str | None) -> str | None:
        within, (sequence, row, field) = [], self.limits
        if reason is None and sequence < UNLIMITED:
            within.append(f"up to {sequence} tokens each (its attention window)")
        if reason is None and row < UNLIMITED:
            within.append(f"in rows of up to {row} tokens (`{field}`)")
        return ", ".join([str(super().note(reason)), *within])

    def hidden(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
        """Return hidden states [R, d] from one packed row, or None if the row is too long."""
        if batch.num_tokens > self.longest_row or batch.longest > self.limits.sequence:
            return None
        try:
            return packed_hidden(model, batch)
        except CannotPackError:  # a mask of the model that the probe did not use
            return None


def packed_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return hidden states [R, d] at `batch.rows`, from a model set to packed attention."""
    device, dtype = batch.input_ids.device, next(model.parameters()).dtype
    layout = make_layout(batch.segments, device, dtype, batch.rows)
    output = base_model(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        # transformers passes a mask of four dimensions on without building its own; packed
        # attention ignores it
        attention_mask=batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        **{LAYOUT: layout},
    )
    hidden = output.last_hidden_state[0]
    if hidden.shape[0] == batch.rows.shape[0]:  # the fast last layer computes only these rows
        return hidden
    return hidden.index_select(0, batch.rows)


# --- the probe ---


@contextmanager
def _recording(layers: Sequence[nn.Module], calls: Calls) -> Iterator[None]:
    """Record the last packed call of each layer: its hidden states and other arguments."""

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


def _why_not_packed(model: nn.Module, batch: PackedBatch, plain: Tensor) -> str | None:
    """Return why packed states differ from `plain` [N, d], the padded states, or None."""
    patches = Patches()
    try:
        with probing(model), computing_in_float32(model):
            far = _at_far_positions(model, batch)
            patches.set_attention(base_model(model), packed_name)
            packed = packed_hidden(model, batch)
            # change the tokens of the second and third sequence
            kept = (batch.token_sequence == 0) | (batch.token_sequence == FAR)
            untouched = torch.zeros_like(batch.rows, dtype=torch.bool)
            untouched[batch.token_row[kept]] = True
            changed = torch.ones_like(batch.input_ids, dtype=torch.bool)
            changed[batch.rows[untouched]] = False
            ids = torch.where(changed, batch.input_ids.flip(0).roll(1), batch.input_ids)
            disturbed = packed_hidden(model, replace(batch, input_ids=ids))
    except Exception as error:  # any error of an architecture: use the plain path
        return f"it does not run packed ({first_line(error)})"
    finally:
        patches.restore()
    if not relative_difference(disturbed[untouched], packed[untouched]).max() <= _UNTOUCHED:
        return "its layers mix tokens of neighbouring sequences"
    by_token = packed[batch.token_row]
    expected = torch.where((batch.token_sequence == FAR)[:, None], far, plain)
    if not (difference := relative_difference(by_token, expected).max().item()) <= _SAME:
        return f"hidden states would differ by {difference:.1g} of their norm"
    return None


def _at_far_positions(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return states [N, d] from plain transformers, for the tokens of the far sequence only.

    The model gets their positions; all other rows are zero.
    """
    tokens = batch.token_sequence == FAR
    places = batch.rows[batch.token_row[tokens]]
    ids, positions = batch.input_ids[places][None], batch.position_ids[places][None]
    output = base_model(model)(input_ids=ids, position_ids=positions, use_cache=False)
    states = output.last_hidden_state[0]
    return states.new_zeros(len(tokens), states.shape[-1]).index_put((tokens,), states)
