"""A combination once more, written from its equations in the plainest way, in float64.

Whole models, one row at a time, every input and output from hooks; dense updates in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chain.families import Family, products
from chainlora.chain.combining import RIDGE, Part
from chainlora.chain.solving import summed_places


@dataclass
class Seen:
    """Inputs and outputs (tokens × width) of the modules of one model, on the rows of one part."""

    given: dict[str, list[Tensor]] = field(default_factory=dict)
    gives: dict[str, list[Tensor]] = field(default_factory=dict)
    last: list[Tensor] = field(default_factory=list)

    def inputs(self, name: str) -> Tensor:
        return torch.cat(self.given[name])

    def outputs(self, name: str) -> Tensor:
        return torch.cat(self.gives[name])


def add_to(module: nn.Module, delta: Tensor) -> None:
    """Add an update (out × in) to the weight of a module."""
    module.weight.data += delta.T if isinstance(module, Conv1D) else delta


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a linear module gives, without its bias."""
    return x @ (module.weight if isinstance(module, Conv1D) else module.weight.T)


def in_sums(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the places of the tokens that the sums include, in all rows one after the other."""
    starts = accumulate(map(len, rows), initial=0)
    return [n + place for row in rows for n in [next(starts)] for place in summed_places(row)]


@torch.no_grad()
def watched(model: nn.Module, rows: Sequence[Sequence[int]], names: Sequence[str]) -> Seen:
    """Run a model on rows, one at a time, and return what some of its modules saw."""
    seen, body = Seen(), getattr(model, model.base_model_prefix)

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, keys: Any, output: Any) -> None:
            x = args[0] if args else keys["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            seen.given.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).clone())
            seen.gives.setdefault(name, []).append(y.reshape(-1, y.shape[-1]).clone())

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in names
    ]
    for row in rows:
        seen.last.append(body(input_ids=torch.tensor([row]), use_cache=False)[0][0])
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def solution(
    model: nn.Module, family: Family, parts: Sequence[Part], rank: int
) -> tuple[dict[str, Tensor], float, dict[str, float]]:
    """Return the combined update of each module, the error of the rank, and the distances."""
    base, combined = deepcopy(model).double(), deepcopy(model).double()
    deltas = [products(part.update) for part in parts]
    own_models = []
    for own in deltas:
        own_models.append(deepcopy(base))
        for name, delta in own.items():
            add_to(own_models[-1].get_submodule(name), delta)
    found: dict[str, Tensor] = {}
    whole = left_out = 0.0
    for layer in range(2):
        path = f"{family.layers}.{layer}"
        for group in [*family.groups, *family.experts]:
            names = [f"{path}.{name}" for name in group]
            watch = [path, *names, *(f"{path}.{n}" for g in family.groups for n in g)]
            for _, terms in family.writers.values():
                watch += [f"{path}.{name}" for name in terms if name]
            watch = [*dict.fromkeys(watch)]
            pairs = [
                (watched(own, part.rows, watch), watched(combined, part.rows, watch))
                for own, part in zip(own_models, parts, strict=True)
            ]
            for name in group:
                target = f"{path}.{name}"
                s, k = equations(family, path, name, base, parts, deltas, pairs)
                if s is None:
                    total = sum(part.importance for part in parts)
                    s = torch.eye(k.shape[1]).double()
                    k = sum(
                        part.importance / total * own.get(target, torch.zeros(k.shape).double())
                        for part, own in zip(parts, deltas, strict=True)
                    )
                full = torch.linalg.solve(s, k, left=False)
                root = torch.linalg.cholesky(s)
                u = torch.linalg.svd(full @ root).U[:, :rank]
                found[target] = u @ u.T @ full
                whole += float((full @ root).square().sum())
                left_out += float(((full - found[target]) @ root).square().sum())
            for name in names:
                add_to(combined.get_submodule(name), found[name])
    distances = {}
    for own, part in zip(own_models, parts, strict=True):
        here, there = (torch.cat(watched(m, part.rows, ()).last) for m in (own, combined))
        distances[part.name] = float((there - here).norm() / here.norm())
    return found, (left_out / whole) ** 0.5, distances


def equations(
    family: Family,
    path: str,
    name: str,
    base: nn.Module,
    parts: Sequence[Part],
    deltas: Sequence[Mapping[str, Tensor]],
    pairs: Sequence[tuple[Seen, Seen]],
) -> tuple[Tensor | None, Tensor]:
    """Return S and K of one module; S is None where no row reaches it."""
    module, target = base.get_submodule(f"{path}.{name}"), f"{path}.{name}"
    width = len(module.weight) if isinstance(module, Conv1D) else module.weight.shape[1]
    out = module.weight.numel() // width
    s, k = None, torch.zeros(out, width).double()
    for part, own, (there, here) in zip(parts, deltas, pairs, strict=True):
        if target not in here.given:  # an expert that no token was sent to
            continue
        x, delta = here.inputs(target), own.get(target, torch.zeros_like(k))
        is_expert = any(name in group for group in family.experts)
        if is_expert:
            t = x @ delta.T
        else:
            t = plain(module, there.inputs(target) - x) + there.inputs(target) @ delta.T
        _, terms = family.writers.get(name, ("", ()))
        for term in terms:
            if term:
                t = t + there.outputs(f"{path}.{term}") - here.outputs(f"{path}.{term}")
            else:
                t = t + there.inputs(path) - here.inputs(path)
        if not is_expert:
            summed = in_sums(part.rows)
            x, t = x[summed], t[summed]
        share = part.importance / (sum(map(len, part.rows)) if is_expert else len(x))
        gram = share * x.T @ x
        ridge = RIDGE * gram.diagonal().mean()
        s = (0 if s is None else s) + gram + ridge * torch.eye(width).double()
        k = k + share * t.T @ x + ridge * delta
    return s, k
