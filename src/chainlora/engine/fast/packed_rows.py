"""The packed path: one row through a model whose attention keeps the sequences in it apart.

Its probe compares hidden states with those of plain transformers, in float32, through all layers,
at positions of the beginning and of the end of the model's context; and it changes the neighbours
of a sequence, which must then stay what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.engine.fast.packed_attention import LAYOUT, CannotPackError, packed_name
from chainlora.engine.fast.packed_layout import make_layout
from chainlora.engine.fast.plugin import PACKED, FastPath
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import Patches
from chainlora.engine.probes import (
    FAR,
    UNLIMITED,
    Calls,
    Facts,
    computing_wide,
    first_line,
    forget_lengths,
    packing_limits,
    probe_batch,
    probing,
    relative_difference,
)
from chainlora.models.text_config import base_model

# Of the norm of a hidden state. Packed and padded rows sum the same numbers in another order: some
# 1e-6 in float32 over thirty layers (norms are float32 in a float64 model too), with a margin for
# states that cancel. Another formula is off by a hundred times that.
_SAME = 1e-4
# A row whose neighbours change goes through the same operations on the same numbers. Experts alone
# see their tokens in groups of another size.
_UNTOUCHED = 1e-6
_SMALLEST_ROW = 1024  # tokens; a model that must stay below is not worth packing


class PackedSequences(FastPath):
    """Sequences of a batch side by side in one row, no padding, common beginnings once."""

    name = PACKED
    longest_sequence: int = UNLIMITED

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why a packed row would give other hidden states; note calls of watched layers."""
        if facts.failure is not None:
            return facts.failure
        batch = probe_batch(model)
        limits = packing_limits(model, batch.longest)
        self.longest_sequence, self.longest_row = limits.sequence, limits.row
        self._row_field = limits.row_field
        if limits.sequence < batch.longest:
            return f"its attention window is {limits.sequence} tokens"
        if limits.row < _SMALLEST_ROW:
            return (
                f"it may behave in another way beyond {limits.row} tokens (`{limits.row_field}` in "
                "its config)"
            )
        with _recording(facts.watched, facts.calls):
            reason = _why_not_packed(model, batch, facts.states)
        forget_lengths(model)
        return reason

    def apply(self, model: nn.Module) -> None:
        self.patches.set_attention(base_model(model), packed_name)

    def note(self, reason: str | None) -> str | None:
        within = []
        if reason is None and self.longest_sequence < UNLIMITED:
            within.append(f"up to {self.longest_sequence} tokens each (its attention window)")
        if reason is None and self.longest_row < UNLIMITED:
            within.append(f"in rows of up to {self.longest_row} tokens (`{self._row_field}`)")
        return ", ".join([str(super().note(reason)), *within])

    def hidden(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
        """Return [R, d] by one row; None for one that is longer than the model allows."""
        if batch.num_tokens > self.longest_row or batch.longest > self.longest_sequence:
            return None
        try:
            return packed_hidden(model, batch)
        except CannotPackError:  # a mask of the model's own, which no probe has met
            return None


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


# --- the probe ---


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


def _why_not_packed(model: nn.Module, batch: PackedBatch, plain: Tensor) -> str | None:
    """Compare the packed row with `plain`, the states of every token in a padded batch."""
    patches = Patches()
    try:
        with probing(model), computing_wide(model):
            far = _at_far_positions(model, batch)
            patches.set_attention(base_model(model), packed_name)
            packed = packed_hidden(model, batch)
            # other tokens in its second branch and its third sequence
            kept = (batch.token_sequence == 0) | (batch.token_sequence == FAR)
            untouched = torch.zeros_like(batch.rows, dtype=torch.bool)
            untouched[batch.token_row[kept]] = True
            changed = torch.ones_like(batch.input_ids, dtype=torch.bool)
            changed[batch.rows[untouched]] = False
            ids = torch.where(changed, batch.input_ids.flip(0).roll(1), batch.input_ids)
            disturbed = packed_hidden(model, replace(batch, input_ids=ids))
    except Exception as error:  # whatever an architecture trips over, the plain path is right
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
    """Return [N, d], filled for the tokens of the last sequence: plain transformers, told where
    they stand."""
    tokens = batch.token_sequence == FAR
    places = batch.rows[batch.token_row[tokens]]
    ids, positions = batch.input_ids[places][None], batch.position_ids[places][None]
    output = base_model(model)(input_ids=ids, position_ids=positions, use_cache=False)
    states = output.last_hidden_state[0]
    return states.new_zeros(len(tokens), states.shape[-1]).index_put((tokens,), states)
