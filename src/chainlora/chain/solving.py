"""Combine states layer by layer: solve each module for its inputs in the model combined so far.

The modules are solved in the order of the forward pass. The update of a module must add T_j
(`chain.combining`) on the rows of part j. T_j is one of

    Y_j − X̃_j W_0ᵀ             by default; Y_j: output of the module in the part's own model
    H_j − (H̃_j + X̃_j W_0ᵀ)     if the module alone adds to the residual stream; H_j: the stream
                               behind it in the part's own model, H̃_j: the combined one without it
    X̃_j ΔW_jᵀ                  in an expert, which gets other tokens in each of the two models

Memory holds the hidden states of all rows in both models, and the outputs inside one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import base_layer, sizes
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
    run,
)
from chainlora.chain.link import Factors, padded
from chainlora.errors import ChainError

_BATCH_TOKENS = 2_048  # tokens of a batch, with padding
_CACHE_BYTES = 1 << 31  # outputs inside one layer; if they need more, they are computed again
_SAMPLE_TOKENS = 16  # length of the row that shows the structure of each layer

Progress = Callable[[int, int], None]


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

    The dictionaries cache tensors of the current layer.
    """

    own: Batch
    combined: Batch
    own_outputs: dict[str, Tensor] = field(default_factory=dict)  # of modules in the own model
    streams: dict[str, Tensor] = field(default_factory=dict)  # of the own model, by point
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of solved modules, combined model
    bases: dict[str, Tensor] = field(default_factory=dict)  # X̃ W_0ᵀ + bias, by module

    def tokens(self, x: Tensor) -> Tensor:
        """Return the rows of x [..., width] that are no padding: [tokens, width]."""
        x, mask = x.reshape(-1, x.shape[-1]), self.own.mask
        return x if bool(mask.all()) else x[mask.flatten()]

    def forget(self) -> None:
        """Empty the caches."""
        for cache in (self.own_outputs, self.streams, self.outputs, self.bases):
            cache.clear()


def _entered(layers: Layers, part: Part) -> list[_BatchPair]:
    """Return the rows of a part before the first layer."""
    batches = map(layers.enter, _batches(part.rows))
    return [_BatchPair(batch, replace(batch)) for batch in batches]


def _without_padding(layers: Layers, pairs: Sequence[_BatchPair]) -> list[_BatchPair]:
    """Split padded batches into single rows: experts would get the padding too."""
    split: list[_BatchPair] = []
    for pair in pairs:
        if bool(pair.own.mask.all()):
            split.append(pair)
            continue
        for row, count in enumerate(pair.own.mask.sum(1).tolist()):
            alone = layers.enter([pair.own.tokens[row, :count].tolist()])
            hidden = (pair.own.hidden, pair.combined.hidden)
            own, combined = (replace(alone, hidden=x[row : row + 1, :count]) for x in hidden)
            split.append(_BatchPair(own, combined))
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
            updates = {name: part.update.get(f"{path}.{name}") for name in self._modules}
            self._updates.append({n: self._on_device(x) for n, x in updates.items() if x})
        self._solved: dict[str, Factors] = {}
        tokens = sum(pair.own.mask.numel() for batches in pairs for pair in batches)
        widths = sum(sizes(base_layer(block.get_submodule(name)))[1] for name in self._modules)
        self._keeps_outputs = 2 * 4 * tokens * widths <= _CACHE_BYTES  # two models, float32

    def _on_device(self, factors: Factors) -> Factors:
        return Factors(factors.a.to(self._device), factors.b.to(self._device))

    def solve(self, group: Sequence[str], rank: int) -> dict[str, Solved]:
        """Solve the modules of a group, which share an input."""
        equations = self._equations()
        for part, updates, pairs in zip(self.parts, self._updates, self.pairs, strict=True):
            sums = Sums()
            for pair in pairs:
                sums.add(*self._inputs_and_targets(pair, updates, group))
                if not self._keeps_outputs:
                    pair.forget()
            if not sums.are_finite():
                raise _not_finite(f"at {self.path}.{group[0]}", part)
            count = sum(int(pair.own.mask.sum()) for pair in pairs)
            of_group = {name: updates[name] for name in group if name in updates}
            equations.add(sums, count, of_group, part.importance)
        solutions = equations.solve(rank)
        self._solved |= {name: self._on_device(s.factors) for name, s in solutions.items()}
        return solutions

    def leave(self) -> None:
        """Advance all batches, in both models, to the input of the next layer."""
        for part, updates, pairs in zip(self.parts, self._updates, self.pairs, strict=True):
            for pair in pairs:
                own = self._run_own(pair, updates)[""]
                combined = self._run_to(pair.combined, self._combined_outputs(pair), "")
                pair.own.hidden, pair.combined.hidden = own, combined
                pair.forget()
                if not bool(pair.tokens(own).isfinite().all()):
                    raise _not_finite(f"behind {self.path}", part)

    def _inputs_and_targets(
        self, pair: _BatchPair, updates: Mapping[str, Factors], group: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return X̃ [tokens, in] of a group, and by module T [tokens, out]."""
        inputs, base = dict[str, Tensor](), pair.bases
        point = self.structure.points.get(group[0])
        combined = self._combined_outputs(pair)

        def observe(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if name not in group:
                return combined(name, x, forward)
            inputs[name], base[name] = x, forward(x)
            if point is None and len(inputs) == len(group):
                raise StopForward  # the stream is not needed
            return base[name].clone()

        if group[0] in self.structure.routed:
            self._run_to(pair.combined, observe, point)
            x = inputs.get(group[0], torch.empty(0))  # empty: no token was sent to the expert
            return x, {n: _product(x, update) for n, update in updates.items() if n in inputs}
        streams = self._run_own(pair, updates)
        stream = self._run_to(pair.combined, observe, point)
        x = pair.tokens(inputs[group[0]])
        if point is not None:
            return x, {group[0]: pair.tokens(streams[point] - stream)}
        targets = {name: pair.own_outputs[name].float() - base[name].float() for name in group}
        return x, {name: pair.tokens(target) for name, target in targets.items()}

    def _run_own(self, pair: _BatchPair, updates: Mapping[str, Factors]) -> dict[str, Tensor]:
        """Run the layer in the part's own model, unless cached; return its streams by point."""
        if not pair.streams:
            points = {*self.structure.points.values()}

            def record(name: str, x: Tensor) -> None:
                if name in points:
                    pair.streams[name] = x.clone()

            hook = _updated_outputs(pair.own_outputs, updates)
            with hooked_outputs(self.block, self._modules, hook), hooked_inputs(self.block, record):
                pair.streams[""] = run(self.block, pair.own, self.index)
        return pair.streams

    def _combined_outputs(self, pair: _BatchPair) -> OutputHook:
        """Return a hook that gives modules their outputs in the combined model.

        A module that is not solved yet gets its output in the part's own model. So the stream
        behind the module being solved differs by that module alone. Experts compute theirs: they
        get other tokens in the part's own model.
        """
        solved = _updated_outputs(pair.outputs, self._solved)

        def hook(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if name in self._solved:
                base = pair.bases.pop(name, None)  # cached when the module was solved
                return solved(name, x, forward if base is None else lambda x: base)
            if name in pair.own_outputs and name not in self.structure.routed:
                return pair.own_outputs[name].clone()
            return forward(x)

        return hook

    def _run_to(self, batch: Batch, hook: OutputHook, point: str | None) -> Tensor:
        """Run the layer up to a point of the stream, and return the stream there."""
        seen = [batch.hidden]

        def stop(name: str, x: Tensor) -> None:
            if name == point:
                seen.append(x)
                raise StopForward

        with hooked_outputs(self.block, self._modules, hook), hooked_inputs(self.block, stop):
            try:
                return run(self.block, batch, self.index)
            except StopForward:
                return seen[-1]


def _not_finite(where: str, part: Part) -> ChainError:
    rule = "states to combine must have finite activations"
    return ChainError(rule, f"infinite or NaN {where}, {part.name}", "leave it out")


def _updated_outputs(outputs: dict[str, Tensor], updates: Mapping[str, Factors]) -> OutputHook:
    """Return a hook that adds updates to the outputs of modules; `outputs` caches the sums."""

    def hook(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in outputs:
            output = forward(x)
            outputs[name] = output + _product(x, updates[name]) if name in updates else output
        return outputs[name].clone()  # Falcon adds to it in place

    return hook


def _product(x: Tensor, factors: Factors) -> Tensor:
    """Return ``x Aᵀ Bᵀ`` [..., out] in float32."""
    return (x.float() @ factors.a.T) @ factors.b.T
