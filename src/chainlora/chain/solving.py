"""States combined layer by layer: each module is solved for inputs in the model that is combined so
far, in the order of the forward pass.

What a module's update must add (T_j of `chain.combining`) is, on rows of part j,

    Y_j − X̃_j W_0ᵀ             Y_j: the module's output in the part's own model
    H_j − (H̃_j + X̃_j W_0ᵀ)     where it alone adds to the residual stream: H_j is the stream behind
                               it in the part's own model, H̃_j without what it adds
    X̃_j ΔW_jᵀ                  in an expert, which gets other tokens in both models

Kept are the hidden states of all rows in both models, and outputs inside one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import base_layer, sizes
from chainlora.chain.combining import Combined, Equations, Part, Solved, Sums
from chainlora.chain.layerwise import (
    Acting,
    Batch,
    Inside,
    Layers,
    Reached,
    acting,
    in_float32,
    look_inside,
    run,
    watching,
)
from chainlora.chain.link import Factors, padded
from chainlora.errors import ChainError

_AT_ONCE = 2_048  # tokens of a batch
_REMEMBERED = 1 << 31  # bytes of outputs inside one layer; of more, all are computed again
_SHORT = 16  # tokens of the row by which layers are looked into

Told = Callable[[int, int], None]


@torch.no_grad()
def combine(
    model: nn.Module,
    parts: Sequence[Part],
    rank: int,
    tell: Told = lambda done, layers: None,
) -> Combined:
    """Return the combination of parts, in the order of their sums.

    `model` is the base, without links; `tell` is called before the first layer, and after each,
    with how many are done. Raises ChainError for modules outside of decoder layers, models that
    cannot be solved layer by layer, and activations that are not finite.
    """
    modules = [*dict.fromkeys(name for part in parts for name in part.update)]
    layers = Layers(model, modules)
    _check(parts, modules, layers)
    sample = [*max((row for part in parts for row in part.rows), key=len)][:_SHORT]
    layers.check(sample)
    looking = layers.enter([sample])
    rows = [_entered(layers, part) for part in parts]
    found: dict[str, Factors] = {}
    whole = left_out = 0.0
    tell(0, len(layers.blocks))
    for place, (path, block) in enumerate(layers.blocks.items()):
        inner = [name.removeprefix(f"{path}.") for name in modules if name.startswith(f"{path}.")]
        with in_float32(block) as exact:
            inside = look_inside(exact, inner, looking, place)
            if inside.routed:
                rows = [[one for each in own for one in _unpadded(layers, each)] for own in rows]
            layer = _Layer(exact, place, inside, path, parts, rows)
            for group in inside.groups:
                for name, solved in layer.solve(group, rank).items():
                    found[f"{path}.{name}"] = padded(solved.factors, rank)
                    whole, left_out = whole + solved.whole, left_out + solved.left_out
            layer.leave()
            looking.hidden = run(exact, looking, place)
        tell(place + 1, len(layers.blocks))
    error = (left_out / whole) ** 0.5 if whole else 0.0
    pairs = zip(parts, rows, strict=True)
    return Combined(found, error, {part.name: _distance(layers, own) for part, own in pairs})


def _check(parts: Sequence[Part], modules: Sequence[str], layers: Layers) -> None:
    for part in parts:
        if not (part.rows and all(part.rows)):
            rule = "parts of a combination must have rows of tokens"
            raise ChainError(rule, f"none, {part.name}", "leave it out")
    if not modules:
        raise ChainError("a combination needs a part with links", "none", "train a stage")
    for name in modules:
        if not any(name.startswith(f"{path}.") for path in layers.blocks):
            rule = "states are combined whose links are on modules of decoder layers"
            raise ChainError(rule, name, "train the stages on top of each other")


@dataclass
class _Rows:
    """Rows of a part in its own model and in the combined one, with what modules of one layer gave
    there: `bases` by the base's weights, for inputs in the combined model. `streams` are those of
    the own model by point."""

    own: Batch
    combined: Batch
    own_outputs: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> Tensor:
        """Return tokens × … of what a module is given or gives."""
        x, inside = x.reshape(-1, x.shape[-1]), self.own.inside
        return x if bool(inside.all()) else x[inside.flatten()]

    def forget(self) -> None:
        for each in (self.own_outputs, self.streams, self.outputs, self.bases):
            each.clear()


def _entered(layers: Layers, part: Part) -> list[_Rows]:
    """Return the rows of a part before the first layer."""
    batches = map(layers.enter, _batches(part.rows))
    return [_Rows(batch, replace(batch)) for batch in batches]


def _unpadded(layers: Layers, rows: _Rows) -> Iterator[_Rows]:
    """Yield rows one by one where some are padded: experts would get the padding too."""
    if bool(rows.own.inside.all()):
        yield rows
        return
    for place, count in enumerate(rows.own.inside.sum(1).tolist()):
        alone = layers.enter([rows.own.tokens[place, :count].tolist()])
        pair = (rows.own.hidden, rows.combined.hidden)
        own, combined = (replace(alone, hidden=x[place : place + 1, :count]) for x in pair)
        yield _Rows(own, combined)


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield rows of about one length, up to `_AT_ONCE` tokens with their padding."""
    batch: list[Sequence[int]] = []
    for row in sorted(rows, key=lambda row: (len(row), [*row])):
        if batch and (len(batch) + 1) * len(row) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _distance(layers: Layers, rows: Sequence[_Rows]) -> float:
    """Return how far the last hidden states are from those of the own model, as a share."""
    away = norm = 0.0
    for each in rows:
        own = layers.leave(each.own)
        away += float((layers.leave(each.combined) - own).square().sum())
        norm += float(own.square().sum())
    return (away / norm) ** 0.5 if norm else 0.0


class _Layer:
    """One decoder layer while its modules are solved, with the rows of all parts before it."""

    def __init__(
        self,
        block: nn.Module,
        place: int,
        inside: Inside,
        path: str,
        parts: Sequence[Part],
        rows: Sequence[Sequence[_Rows]],
    ) -> None:
        self.block, self.place, self.inside, self.path = block, place, inside, path
        self.parts, self.rows = parts, rows
        self._device = rows[0][0].own.hidden.device
        self._modules = [name for group in inside.groups for name in group]
        self._updates = [
            {
                n: self._here(p.update[f"{path}.{n}"])
                for n in self._modules
                if f"{path}.{n}" in p.update
            }
            for p in parts
        ]
        self._solved: dict[str, Factors] = {}
        tokens = sum(each.own.inside.numel() for own in rows for each in own)
        widths = sum(sizes(base_layer(block.get_submodule(name)))[1] for name in self._modules)
        self._remembers = 2 * 4 * tokens * widths <= _REMEMBERED

    def _here(self, factors: Factors) -> Factors:
        return Factors(factors.a.to(self._device), factors.b.to(self._device))

    def solve(self, group: Sequence[str], rank: int) -> dict[str, Solved]:
        """Return the solution of modules that share an input."""
        equations = Equations()
        for part, updates, rows in zip(self.parts, self._updates, self.rows, strict=True):
            sums = Sums()
            for each in rows:
                sums.add(*self._observed(each, updates, group))
                if not self._remembers:
                    each.forget()
            if not sums.are_finite():
                raise _not_finite(f"at {self.path}.{group[0]}", part)
            count = sum(int(each.own.inside.sum()) for each in rows)
            own = {name: updates[name] for name in group if name in updates}
            equations.add(sums, count, own, part.importance)
        found = equations.solve(rank)
        self._solved |= {name: self._here(each.factors) for name, each in found.items()}
        return found

    def leave(self) -> None:
        """Bring all rows behind the layer."""
        for part, updates, rows in zip(self.parts, self._updates, self.rows, strict=True):
            for each in rows:
                own = self._own(each, updates)[""]
                combined = self._passed(each.combined, self._combined(each), "")
                each.own.hidden, each.combined.hidden = own, combined
                each.forget()
                if not bool(each.tokens(own).isfinite().all()):
                    raise _not_finite(f"behind {self.path}", part)

    def _observed(
        self, rows: _Rows, updates: Mapping[str, Factors], group: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return inputs of a group in the combined model (tokens × in), and what the update of each
        of its modules must add (tokens × out)."""
        inputs, base = dict[str, Tensor](), rows.bases
        point = self.inside.points.get(group[0])
        until = group if point is None else ()
        combined = self._combined(rows)

        def observe(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if name not in group:
                return combined(name, x, forward)
            inputs[name], base[name] = x, forward(x)
            return base[name].clone()

        if group[0] in self.inside.routed:
            self._passed(rows.combined, _ending(observe, until), point)
            x = inputs.get(group[0], torch.empty(0))  # none, where no token was sent to it
            return x, {n: _added(x, each) for n, each in updates.items() if n in inputs}
        streams = self._own(rows, updates)
        now = self._passed(rows.combined, _ending(observe, until), point)
        x = rows.tokens(inputs[group[0]])
        if point is not None:
            return x, {group[0]: rows.tokens(streams[point] - now)}
        pairs = {name: rows.own_outputs[name].float() - base[name].float() for name in group}
        return x, {name: rows.tokens(each) for name, each in pairs.items()}

    def _own(self, rows: _Rows, updates: Mapping[str, Factors]) -> dict[str, Tensor]:
        """Run the layer in the part's own model, once; return its streams by point."""
        if not rows.streams:
            points = {*self.inside.points.values()}

            def see(name: str, x: Tensor) -> None:
                if name in points:
                    rows.streams[name] = x.clone()

            act = _remembering(rows.own_outputs, updates)
            with acting(self.block, self._modules, act), watching(self.block, see):
                rows.streams[""] = run(self.block, rows.own, self.place)
        return rows.streams

    def _combined(self, rows: _Rows) -> Acting:
        """Let modules give what they give in the combined model; those that are not solved yet,
        what they give in the part's own model: the stream behind the module that is solved then
        differs by that module alone. Experts get other tokens there."""
        solved = _remembering(rows.outputs, self._solved)

        def act(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if name in self._solved:
                base = rows.bases.pop(name, None)  # where it has been computed for its equations
                return solved(name, x, forward if base is None else lambda x: base)
            if name in rows.own_outputs and name not in self.inside.routed:
                return rows.own_outputs[name].clone()
            return forward(x)

        return act

    def _passed(self, batch: Batch, act: Acting, point: str | None) -> Tensor:
        """Run the layer up to a point of the stream, and return what is there."""
        seen = [batch.hidden]

        def see(name: str, x: Tensor) -> None:
            if name == point:
                seen.append(x)
                raise Reached

        with acting(self.block, self._modules, act), watching(self.block, see):
            try:
                return run(self.block, batch, self.place)
            except Reached:
                return seen[-1]


def _not_finite(where: str, part: Part) -> ChainError:
    rule = "states that are combined must have finite activations"
    return ChainError(rule, f"others {where}, {part.name}", "leave it out")


def _remembering(outputs: dict[str, Tensor], updates: Mapping[str, Factors]) -> Acting:
    """Let modules add updates to what they give, once each."""

    def act(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in outputs:
            found = forward(x)
            outputs[name] = found + _added(x, updates[name]) if name in updates else found
        return outputs[name].clone()  # Falcon adds to it in place

    return act


def _added(x: Tensor, factors: Factors) -> Tensor:
    return (x.float() @ factors.a.T) @ factors.b.T


def _ending(act: Acting, modules: Sequence[str]) -> Acting:
    """End the forward pass where all of some modules have been called."""
    due = {*modules}

    def ending(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        found = act(name, x, forward)
        due.discard(name)
        if modules and not due:
            raise Reached
        return found

    return ending
