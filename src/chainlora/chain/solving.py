"""Combine states layer by layer: solve each module for its inputs in the model combined so far.

The modules are solved in the order of the forward pass. The update of a module must add T_j
(`chain.combining`) on the rows of part j. T_j is one of

    X_j (W_0 + ΔW_j)ᵀ − X̃_j W_0ᵀ   by default; X_j: input of the module in the part's own model
    H_j − (H̃_j + X̃_j W_0ᵀ + bias)  if the module alone adds to the residual stream; H_j: the stream
                                   behind it in the part's own model, H̃_j: the combined one
                                   without it
    X̃_j ΔW_jᵀ                      in an expert, which gets other tokens in each of the two models

All tokens of the rows are run, but the sums include a part of them (`summed_places`); in experts,
all of them. Memory holds the hidden states of all rows in both models and, inside one layer, the
inputs that the sums need and those of modules whose outputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from chainlora.chain.adapters import base_layer, is_transposed, sizes
from chainlora.chain.combining import Combined, Equations, Part, Solved, Sums
from chainlora.chain.layerwise import (
    Batch,
    Layers,
    LayerStructure,
    OutputHook,
    StopForward,
    hooked_inputs,
    hooked_outputs,
    in_float32,
    inspect_layer,
    known_outputs,
    run,
)
from chainlora.chain.link import Factors, padded
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized

_BATCH_TOKENS = 2_048  # tokens of a batch, with padding
_CACHE_BYTES = 1 << 31  # of outputs of solved modules; beyond it they are computed again
_STEP, _LAST = 2, 4  # the sums include each second token of a row, and its last four
_SAMPLE_TOKENS = 16  # length of the row that shows the structure of each layer

Progress = Callable[[int, int], None]
Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def combine(
    model: nn.Module,
    parts: Sequence[Part],
    rank: int,
    tell: Progress = lambda done, layers: None,
    equations: Callable[[], Equations] = Equations,
) -> Combined:
    """Return the combination of several states of one base.

    Args:
        model: the base, without links, in evaluation mode.
        parts: the states. Sums are added in their order.
        rank: rank of the combined update.
        tell: called before the first layer and after each one, with the numbers of finished layers
            and of all layers.

    Raises:
        ChainError: a module is outside the decoder layers, the model cannot be run layer by layer,
            a part has no rows, or an activation is not finite.
    """
    modules = [*dict.fromkeys(name for part in parts for name in part.update)]
    layers = Layers(model, modules)
    _check(parts, modules, layers)
    sample_row = [*max((row for part in parts for row in part.rows), key=len)][:_SAMPLE_TOKENS]
    layers.check(sample_row)
    sample = layers.enter([sample_row])
    pairs = [_entered(layers, part) for part in parts]
    factors: dict[str, Factors] = {}
    whole = left_out = 0.0
    tell(0, len(layers.blocks))
    for index, (path, block) in enumerate(layers.blocks.items()):
        inner = [name.removeprefix(f"{path}.") for name in modules if name.startswith(f"{path}.")]
        with in_float32(block) as exact:
            structure = inspect_layer(exact, inner, sample, index)
            if structure.routed:
                pairs = [_without_padding(layers, batches) for batches in pairs]
            layer = _Layer(exact, index, structure, path, parts, pairs, equations)
            layer.run_own_models()
            for group in structure.groups:
                for name, solved in layer.solve(group, rank).items():
                    factors[f"{path}.{name}"] = padded(solved.factors, rank)
                    whole, left_out = whole + solved.whole, left_out + solved.left_out
            layer.leave()
            sample.hidden = run(exact, sample, index)
        tell(index + 1, len(layers.blocks))
    error = (left_out / whole) ** 0.5 if whole else 0.0
    of_parts = zip(parts, pairs, strict=True)
    distances = {part.name: _distance(layers, batches) for part, batches in of_parts}
    return Combined(factors, error, distances)


def _check(parts: Sequence[Part], modules: Sequence[str], layers: Layers) -> None:
    for part in parts:
        if not (part.rows and all(part.rows)):
            rule = "every part of a combination must have rows of tokens"
            raise ChainError(rule, f"none, {part.name}", "leave it out")
    if not modules:
        raise ChainError("a combination needs a part with links", "none", "train a stage")
    for name in modules:
        if not any(name.startswith(f"{path}.") for path in layers.blocks):
            rule = "states can be combined only if all their links are inside decoder layers"
            raise ChainError(rule, name, "train the stages on top of each other")


@dataclass
class _BatchPair:
    """One batch of a part's rows: in the part's own model and in the combined model.

    The dictionaries hold tensors of the current layer.
    """

    own: Batch
    combined: Batch
    summed: Tensor  # [rows, length], true for tokens that the sums include
    own_inputs: dict[str, Tensor] = field(default_factory=dict)  # by first module of a group
    own_streams: dict[str, Tensor] = field(default_factory=dict)  # by point
    own_outputs: dict[str, Tensor] = field(default_factory=dict)  # of late modules
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # X̃ and X̃ W_0ᵀ + bias
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of solved modules, combined model

    def pick(self, x: Tensor) -> Tensor:
        """Return the rows of x [..., width] that the sums include: [tokens, width]."""
        return x.reshape(-1, x.shape[-1])[self.summed.flatten()]

    def forget(self) -> None:
        """Empty the dictionaries."""
        for cache in (self.own_inputs, self.own_streams, self.own_outputs, self.outputs):
            cache.clear()


def _entered(layers: Layers, part: Part) -> list[_BatchPair]:
    """Return the rows of a part before the first layer."""
    pairs = []
    for rows in _batches(part.rows):
        batch = layers.enter(rows)
        summed = torch.zeros_like(batch.mask)
        for place, row in enumerate(rows):
            summed[place, summed_places(row)] = True
        pairs.append(_BatchPair(batch, replace(batch), summed))
    return pairs


def summed_places(row: Sequence[int]) -> list[int]:
    """Return the places of the tokens of a row that the sums include: a function of the row."""
    last, shift = len(row) - 1, sum(row)
    return [p for p in range(len(row)) if last - p < _LAST or (p + shift) % _STEP == 0]


def _without_padding(layers: Layers, pairs: Sequence[_BatchPair]) -> list[_BatchPair]:
    """Split padded batches into single rows: experts would get the padding too."""
    split: list[_BatchPair] = []
    for pair in pairs:
        if bool(pair.own.mask.all()):
            split.append(pair)
            continue
        for row, count in enumerate(pair.own.mask.sum(1).tolist()):
            alone = layers.enter([pair.own.tokens[row, :count].tolist()])
            whole = (pair.own.hidden, pair.combined.hidden, pair.summed)
            own, combined, summed = (x[row : row + 1, :count] for x in whole)
            pairs_of_row = (replace(alone, hidden=own), replace(alone, hidden=combined))
            split.append(_BatchPair(*pairs_of_row, summed))
    return split


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield batches of rows of similar length, with up to `_BATCH_TOKENS` tokens and padding."""
    batch: list[Sequence[int]] = []
    for row in sorted(rows, key=lambda row: (len(row), [*row])):
        if batch and (len(batch) + 1) * len(row) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _distance(layers: Layers, pairs: Sequence[_BatchPair]) -> float:
    """Return the relative distance of the last hidden states from those of the part's own model."""
    squared = norm = 0.0
    for pair in pairs:
        own = layers.leave(pair.own)
        squared += float((layers.leave(pair.combined) - own).square().sum())
        norm += float(own.square().sum())
    return (squared / norm) ** 0.5 if norm else 0.0


class _Layer:
    """One decoder layer while its modules are solved."""

    def __init__(
        self,
        block: nn.Module,  # in float32
        index: int,
        structure: LayerStructure,
        path: str,
        parts: Sequence[Part],
        pairs: Sequence[Sequence[_BatchPair]],  # batches of each part, before this layer
        equations: Callable[[], Equations],
    ) -> None:
        self._equations = equations
        self.block, self.index, self.structure, self.path = block, index, structure, path
        self.parts, self.pairs = parts, pairs
        self._device = pairs[0][0].own.hidden.device
        self._modules = [name for group in structure.groups for name in group]
        self._updates: list[dict[str, Factors]] = []  # of each part, by module
        for part in parts:
            named = {name: part.update.get(f"{path}.{name}") for name in self._modules}
            self._updates.append({n: self._on_device(x) for n, x in named.items() if x})
        self._solved: dict[str, Forward] = {}
        tokens = sum(pair.own.mask.numel() for batches in pairs for pair in batches)
        widths = [sum(sizes(self._base(name))) for name in structure.ends]
        keeps = 4 * tokens * max(widths, default=0) <= _CACHE_BYTES  # float32
        self._ends = structure.ends if keeps else {}

    def _base(self, name: str) -> nn.Module:
        layer: nn.Module = base_layer(self.block.get_submodule(name))
        return layer

    def _on_device(self, factors: Factors) -> Factors:
        return Factors(factors.a.to(self._device), factors.b.to(self._device))

    def run_own_models(self) -> None:
        """Advance all batches in the parts' own models, and keep what the equations need."""
        for updates, pairs in zip(self._updates, self.pairs, strict=True):
            updated = {name: _updated(self._base(name), each) for name, each in updates.items()}
            for pair in pairs:
                self._run_own(pair, updated)

    def solve(self, group: Sequence[str], rank: int) -> dict[str, Solved]:
        """Solve the modules of a group, which share an input."""
        equations = self._equations()
        is_routed = group[0] in self.structure.routed
        for part, updates, pairs in zip(self.parts, self._updates, self.pairs, strict=True):
            sums = Sums()
            for pair in pairs:
                self._add(sums, pair, group)
            if not sums.are_finite():
                raise _not_finite(f"at {self.path}.{group[0]}", part)
            masks = [pair.own.mask if is_routed else pair.summed for pair in pairs]
            count = sum(int(mask.sum()) for mask in masks)
            of_group = {name: updates[name] for name in group if name in updates}
            equations.add(sums, count, of_group, part.importance)
        if equations.shift is not None:
            for name in group:
                equations.add_product(name, self._times_base(name, equations.shift))
        solutions = equations.solve(rank)
        for name, solved in solutions.items():
            factors = self._on_device(solved.factors)
            self._solved[name] = _updated(self._base(name), factors)
            for pair in (pair for pairs in self.pairs for pair in pairs if name in pair.seen):
                x, base = pair.seen.pop(name)
                pair.outputs[name] = base + _product(x, factors)
        return solutions

    def leave(self) -> None:
        """Advance all batches in the combined model."""
        for part, pairs in zip(self.parts, self.pairs, strict=True):
            for pair in pairs:
                hook = self._combined_outputs(pair)
                pair.combined.hidden = self._run_to(pair, hook, "")
                pair.forget()
                if not bool(pair.own.hidden[pair.own.mask].isfinite().all()):
                    raise _not_finite(f"behind {self.path}", part)

    def _times_base(self, name: str, x: Tensor) -> Tensor:
        """Return ``W_0 x`` by the forward of the module itself."""
        layer, columns = self._base(name), x.T.float().to(self._device)
        return (layer(columns) - layer(torch.zeros_like(columns[:1]))).T

    def _add(self, sums: Sums, pair: _BatchPair, group: Sequence[str]) -> None:
        """Add the tokens of a batch to the sums of a group."""
        name, *_ = group
        point = self.structure.points.get(name)
        x, stream = self._run_to_module(pair, name, point)
        if name in self.structure.routed:
            sums.add(x.reshape(-1, x.shape[-1]))
        elif point is None:
            sums.add(pair.pick(x), own=pair.own_inputs[name])
        else:
            sums.add(pair.pick(x), {name: pair.own_streams[point] - pair.pick(stream)})

    def _run_to_module(
        self, pair: _BatchPair, name: str, point: str | None
    ) -> tuple[Tensor, Tensor]:
        """Return X̃ of a module, and the stream at its point with X̃ W_0ᵀ as its output."""
        inputs = [torch.empty(0, 1)]  # if no token is sent to the expert
        combined = self._combined_outputs(pair)

        def observe(called: str, x: Tensor, forward: Forward) -> Tensor:
            if called != name:
                return combined(called, x, forward)
            inputs.append(x)
            if point is None:
                raise StopForward  # the stream is not needed
            output = forward(x)
            if name in self._ends:
                pair.seen[name] = x, output.clone()  # Falcon adds to it in place
            return output

        stream = self._run_to(pair, observe, point)
        return inputs[-1], stream

    def _run_own(self, pair: _BatchPair, updated: Mapping[str, Forward]) -> None:
        points = {*self.structure.points.values()}
        firsts = {group[0] for group in self.structure.groups}
        firsts -= self.structure.points.keys() | self.structure.routed

        def record(name: str, x: Tensor) -> None:
            if name in points:
                pair.own_streams[name] = pair.pick(x)

        def hook(name: str, x: Tensor, forward: Forward) -> Tensor:
            if name in firsts:
                pair.own_inputs[name] = pair.pick(x)
            output = updated.get(name, forward)(x)
            if name in self.structure.late:
                pair.own_outputs[name] = output.clone()
            return output

        with hooked_outputs(self.block, self._modules, hook), hooked_inputs(self.block, record):
            pair.own.hidden = run(self.block, pair.own, self.index)
        pair.own_streams[""] = pair.pick(pair.own.hidden)

    def _combined_outputs(self, pair: _BatchPair) -> OutputHook:
        """Return a hook that gives modules their outputs in the combined model.

        A late module that is not solved yet gets its output in the part's own model. So the stream
        behind the module being solved differs by that module alone.
        """

        def hook(name: str, x: Tensor, forward: Forward) -> Tensor:
            if name in self._solved:
                return self._solved[name](x)
            if name in pair.own_outputs:
                return pair.own_outputs[name].clone()
            return forward(x)

        return hook

    def _run_to(self, pair: _BatchPair, hook: OutputHook, point: str | None) -> Tensor:
        """Run the layer in the combined model up to a point of the stream; return the stream."""
        seen = [pair.combined.hidden]

        def stop(name: str, x: Tensor) -> None:
            if name == point:
                seen.append(x)
                raise StopForward

        known = {self._ends[name]: output for name, output in pair.outputs.items()}
        with (
            hooked_outputs(self.block, self._modules, hook),
            hooked_inputs(self.block, stop),
            known_outputs(self.block, known),
        ):
            try:
                return run(self.block, pair.combined, self.index)
            except StopForward:
                return seen[-1]


def _not_finite(where: str, part: Part) -> ChainError:
    rule = "states to combine must have finite activations"
    return ChainError(rule, f"infinite or NaN {where}, {part.name}", "leave it out")


def _updated(layer: Any, factors: Factors) -> Forward:
    """Return the forward of a linear layer with an update, in its weight unless it is quantised."""
    forward = layer.forward
    if is_quantized(layer):
        return lambda x: forward(x) + _product(x, factors)
    weight = layer.weight.T if is_transposed(layer) else layer.weight
    return partial(linear, weight=weight + factors.b @ factors.a, bias=layer.bias)


def _product(x: Tensor, factors: Factors) -> Tensor:
    """Return ``x Aᵀ Bᵀ`` [..., out] in float32."""
    return (x.float() @ factors.a.T) @ factors.b.T
