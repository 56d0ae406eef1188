"""Updates of stages merged: without data, or in closed form from inputs of kept rows.

Mean: task arithmetic (arXiv 2212.04089). TIES (2306.01708) is PEFT's: of each update the largest
entries by magnitude, the sign of the larger total, and the mean of the entries of that sign.

RegMean++ (arXiv 2508.03121): layer by layer, W = (Σ G_i)⁻¹ Σ G_i W_i, where G_i is the mean over
tokens of x xᵀ for inputs x of the module in model i's own layer, which gets the hidden states that
the merged layers before it give; off-diagonal entries of G_i are scaled. `reduced` and `averaged`
are one module's equations.

IterIS (2411.15231): W = Σ λ_i W_i (X_iᵀX̃_i + α‖·‖I) (Σ λ_i (X̃_iᵀX̃_i + α‖·‖I))⁻¹, X_i the inputs in
model i, X̃_i those in the merged model of the pass before (X_i in the first), λ_i = ‖W_i‖² /
‖X_i W_iᵀ‖² with the base in W_i, and X̃ a little mixed with X. `Aligned` is one module's equations.

All W_i of a module share the base weight, so updates are solved for: W = W_0 + the same formula of
the updates in RegMean++; IterIS does so itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.merge_utils import ties as merge_ties
from torch import Tensor

from chainlora import Link
from chainlora.chain.adapters import is_transposed
from chainlora.chain.layerwise import Layers, run

Rows = Mapping[str, Sequence[Sequence[int]]]
Links = Mapping[str, Sequence[Link]]
Shape = tuple[int, int]
DENSITY = 0.2  # of TIES, its paper's
ALPHA, MIXED = 1e-7, 5e-4  # of IterIS, its authors' values


# --- without data ---


def mean(model: Any, links: Links, rows: Rows, scale: float = 1.0) -> dict[str, Tensor]:
    """Return the mean of updates, times a scale."""
    share = scale / len(links)
    return {n: torch.stack(each).sum(0) * share for n, each in _by_module(links)}


def ties(model: Any, links: Links, rows: Rows, scale: float = 1.0) -> dict[str, Tensor]:
    """Return updates merged by TIES, times a scale, module by module."""
    weights = torch.full((len(links),), scale)
    return {name: merge_ties(each, weights, DENSITY) for name, each in _by_module(links)}


def sums(links: Sequence[Link], modules: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return the update of links that stand on each other: zeros for modules that none of them has.

    `modules` gives the shape (out × in) of each.
    """
    return {
        name: sum((e.delta_weight(name) for e in links if name in e.factors), torch.zeros(shape))
        for name, shape in modules.items()
    }


def modules_of(links: Links) -> dict[str, Shape]:
    """Return the modules that any link has, with the shape (out × in) of each."""
    return {
        name: (factors.b.shape[0], factors.a.shape[1])
        for own in links.values()
        for link in own
        for name, factors in link.factors.items()
    }


def _by_module(links: Links) -> Iterator[tuple[str, list[Tensor]]]:
    for name, shape in modules_of(links).items():
        yield name, [sums(own, {name: shape})[name] for own in links.values()]


# --- a model ---


def weight_of(model: Any, name: str) -> Tensor:
    """Return a module's weight as it is used (out × in), whose entries can be changed in place."""
    module = model.get_submodule(name)
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


@contextmanager
def added(model: Any, update: Mapping[str, Tensor]) -> Iterator[None]:
    """Add updates to weights for a while, summed in float32."""
    with torch.no_grad():
        weights = {name: weight_of(model, name) for name in update}
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(weight.float() + update[name].to(weight.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


@contextmanager
def _inputs(model: Any, modules: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Note the inputs (tokens × in) of modules."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))

    with ExitStack() as hooks:
        for n in modules:
            hooks.enter_context(model.get_submodule(n).register_forward_pre_hook(note(n)))
        yield seen


# --- RegMean++ ---


def reduced(gram: Tensor, off_diagonal: float) -> Tensor:
    """Return a Gram matrix with its off-diagonal entries scaled."""
    return gram * off_diagonal + torch.diag(gram.diagonal() * (1 - off_diagonal))


def averaged(grams: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
    """Return (Σ G_i)⁻¹ Σ G_i ΔW_iᵀ as an update (out × in)."""
    total = torch.stack([*grams]).sum(0)
    products = sum(gram @ each.T.double() for gram, each in zip(grams, updates, strict=True))
    # where no row reaches, the inverse does not exist: a floor of the size of rounding
    total.diagonal().add_(1e-8 * float(total.diagonal().mean()))
    return torch.linalg.solve(total, products).T.float()


@torch.no_grad()
def regmean(model: Any, links: Links, rows: Rows, off_diagonal: float = 0.9) -> dict[str, Tensor]:
    """Merge layer by layer; `model` is the base, and is that again afterwards."""
    modules = modules_of(links)
    layers, found = Layers(model, [*modules]), {}
    batches = {task: [layers.enter([row]) for row in some] for task, some in rows.items()}
    for place, (path, block) in enumerate(layers.blocks.items()):
        inner = {name: each for name, each in modules.items() if name.startswith(f"{path}.")}
        grams: dict[str, list[Tensor]] = {name: [] for name in inner}
        for task, own in batches.items():
            with added(model, sums(links[task], inner)), _inputs(model, [*inner]) as seen:
                for batch in own:
                    run(block, batch, place)
            for name in inner:
                x = torch.cat(seen[name])
                grams[name].append(reduced((x.T @ x / len(x)).double(), off_diagonal))
        deltas = {task: sums(own, inner) for task, own in links.items()}
        for name in inner:
            found[name] = averaged(grams[name], [deltas[task][name] for task in batches])
        with added(model, {name: found[name] for name in inner}):
            for own in batches.values():
                for batch in own:
                    batch.hidden = run(block, batch, place)
    return found


# --- IterIS ---


class Aligned:
    """Sums over tasks for one module: Σ λ_i ΔW_i (…) and Σ λ_i (…)."""

    def __init__(self) -> None:
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, x: Tensor, merged: Tensor, update: Tensor, weight: Tensor) -> None:
        """Add a task: inputs in its own model and in the merged one (tokens × in), its update and
        its whole weight (out × in)."""
        merged = (1 - MIXED) * merged + MIXED * x
        share = float(weight.square().sum() / (x @ weight.T).square().sum())
        cross, gram = (_raised((a.T @ merged).double()) for a in (x, merged))
        self.first = self.first + share * (update.double() @ cross)
        self.second = self.second + share * gram

    def solve(self) -> Tensor:
        """Return the merged update."""
        assert isinstance(self.first, Tensor)
        assert isinstance(self.second, Tensor)
        return torch.linalg.solve(self.second.T, self.first.T).T.float()


def _raised(product: Tensor) -> Tensor:
    return product + ALPHA * product.norm() * torch.eye(len(product), dtype=product.dtype)


@torch.no_grad()
def iteris(model: Any, links: Links, rows: Rows, passes: int = 1) -> dict[str, Tensor]:
    """Merge in so many passes; `model` is the base, and is that again afterwards."""
    modules = modules_of(links)
    base = {name: weight_of(model, name).detach().clone() for name in modules}
    found: dict[str, Tensor] = {}
    for _ in range(passes):
        totals = {name: Aligned() for name in modules}
        for task, own in rows.items():
            deltas = sums(links[task], modules)
            x = _seen(model, deltas, [*modules], own)
            merged = _seen(model, found, [*modules], own) if found else x
            for name in modules:
                totals[name].add(x[name], merged[name], deltas[name], base[name] + deltas[name])
        found = {name: totals.pop(name).solve() for name in modules}
    return found


def _seen(
    model: Any, update: Mapping[str, Tensor], modules: Sequence[str], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return the inputs of modules for rows, in the base with an update."""
    with added(model, update), _inputs(model, modules) as seen:
        for row in rows:
            ids = torch.tensor([[*row]], device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
    return {name: torch.cat(some) for name, some in seen.items()}
