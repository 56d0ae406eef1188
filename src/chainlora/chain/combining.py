"""States combined in closed form (RegMean, arXiv 2212.09849): the weights whose outputs are nearest
to each state's own outputs on its own inputs.

    W = W_0 + Σ_i B_i A'_i,   A'_i = (Σ_j A_i^(j) Ĝ_j) (Σ_j Ĝ_j)⁻¹,   Ĝ_j = G_j + λ (tr G_j / d) I

minimises Σ_j tr[(W − W_j) Ĝ_j (W − W_j)ᵀ]. G_j is the mean of x xᵀ over the inputs x of a layer,
for rows of state j; A_i^(j) is A of link i in state j, times its strength there, and 0 where the
state is without the link. Each link keeps its B and its rank. The ridge λ stands in both sums: then
one state combined is itself, and a direction that no state has seen gets the mean of the updates.
Inputs of some 2,000 tokens are multiplied in float32; their products are added, and the equations
solved, in float64, on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import base_layer
from chainlora.errors import ChainError
from chainlora.models.text_config import base_model

RIDGE = 0.001
Grams = Mapping[str, Tensor]
"""By module, G (in × in); of an embedding its diagonal (tokens)."""


class Combination:
    """The sums over states of some modules; `add` each state, then `solve`."""

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self._whole: dict[str, Tensor] = {}  # Σ_j Ĝ_j by module
        self._parts: dict[tuple[str, str], Tensor] = {}  # Σ_j A_i^(j) Ĝ_j by link and module
        self._known: dict[tuple[str, str], Tensor] = {}  # A of links

    def add(self, grams: Grams, links: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add a state: the Grams of its inputs, which are used up, and A of its links (rank × in)
        by link and module.

        Modules that share an input have one Gram, the same object in every state. Raises ChainError
        for inputs that are not finite.
        """
        for module, gram in {id(each[1]): each for each in grams.items()}.values():
            if not diagonal_of(gram).isfinite().all():  # what else is not, has one there
                raise ChainError("inputs of a layer must be finite", f"others of {module}")
            add_ridge(gram, self.ridge)
        for link, factors in links.items():
            for module, a in factors.items():
                self._known.setdefault((link, module), a)
                if module in grams:
                    gram = grams[module]
                    part = a.double() * gram if gram.dim() == 1 else a.double() @ gram
                    key = (link, module)
                    self._parts[key] = self._parts[key] + part if key in self._parts else part
        _add_shared(self._whole, grams)

    def solve(self) -> dict[str, dict[str, Tensor]]:
        """Return A' (rank × in, float32) by link and module; A where no state has an input."""
        found: dict[str, dict[str, Tensor]] = {}
        roots = set[int]()
        for (link, module), a in self._known.items():
            whole, part = self._whole.get(module), self._parts.get((link, module))
            if whole is None or not diagonal_of(whole).any():  # no state has an input
                solved = a
            elif part is None:  # only states without the link use the module
                solved = torch.zeros_like(a)
            elif whole.dim() == 1:
                solved = (part / whole).float()
            else:
                if id(whole) not in roots:  # in place: it is not needed any more
                    torch.linalg.cholesky(whole, out=whole)
                    roots.add(id(whole))
                solved = torch.cholesky_solve(part.T, whole).T.float().contiguous()
            found.setdefault(link, {})[module] = solved
        return found


def add_ridge(gram: Tensor, ridge: float) -> None:
    """Make a Gram G + λ (tr G / d) I, or a diagonal that of this."""
    diagonal = diagonal_of(gram)
    diagonal += ridge * diagonal.mean()


def diagonal_of(gram: Tensor) -> Tensor:
    return gram if gram.dim() == 1 else gram.diagonal()


def gram_matrices(
    model: nn.Module, modules: Collection[str], rows: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return the mean of x xᵀ (float64) over the inputs of modules for rows of tokens (1 × length).

    Rows are read one by one, without padding. Layers that share an input share the work.
    """
    sums: dict[str, Tensor] = {}
    count = pending = 0
    called = _calling(model, modules)
    with _kept_inputs(model, modules) as (inputs, layers), torch.no_grad():
        for row in rows:
            called(input_ids=row, use_cache=False)
            count, pending = count + row.numel(), pending + row.numel()
            if pending >= _AT_ONCE:
                _add_products(sums, inputs, layers)
                pending = 0
        _add_products(sums, inputs, layers)
    for total in {id(total): total for total in sums.values()}.values():
        total.div_(count)
    return sums


def modules_by_input(
    model: nn.Module, modules: Collection[str], row: Tensor
) -> Iterable[list[str]]:
    """Return modules, those that share an input for a row of tokens (1 × length) together."""
    found: dict[object, list[str]] = {}
    with _kept_inputs(model, modules) as (inputs, _), torch.no_grad():
        model(input_ids=row, use_cache=False)
        for name, parts in inputs.items():
            found.setdefault(_identity(parts) or name, []).append(name)
    return found.values()


def _calling(model: nn.Module, modules: Collection[str]) -> nn.Module:
    """Return the part of a causal language model that calls modules: all of it, or all but the
    head."""
    body = base_model(model)
    inside = {*body.modules()}
    return body if all(model.get_submodule(name) in inside for name in modules) else model


@contextmanager
def _kept_inputs(
    model: nn.Module, modules: Collection[str]
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, nn.Module]]]:
    """Keep what modules are called with; give that and the layers."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    layers = {name: base_layer(model.get_submodule(name)) for name in modules}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(_keeper(inputs[name]))
            hooks.callback(handle.remove)
        yield inputs, layers


_AT_ONCE = 2048  # tokens whose inputs wait for one product


def _keeper(kept: list[Tensor]) -> Any:
    return lambda module, args: kept.append(args[0].detach())


def _add_products(
    sums: dict[str, Tensor], inputs: Mapping[str, list[Tensor]], layers: Mapping[str, nn.Module]
) -> None:
    """Add what inputs give to the sums, and forget them."""
    products: dict[object, Tensor] = {}
    found = {}
    for name, parts in inputs.items():
        key = _identity(parts)
        if parts and key not in products:
            products[key] = _product(parts, layers[name])
        if parts:  # else an expert that no token was sent to
            found[name] = products[key]
    _add_shared(sums, found)
    for parts in inputs.values():
        parts.clear()


def _identity(parts: list[Tensor]) -> tuple[object, ...]:
    return tuple((part.data_ptr(), part.shape, part.stride()) for part in parts)


def _product(parts: list[Tensor], layer: Any) -> Tensor:
    if isinstance(layer, nn.Embedding):
        tokens = torch.cat([part.flatten() for part in parts]).cpu()
        return torch.bincount(tokens, minlength=layer.num_embeddings).double()
    x = torch.cat([part.flatten(0, -2) for part in parts]).cpu()
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half the time of float64
    return (x.T @ x).double()


def _add_shared(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values in place; those that share an object share their sum, which is added to once."""
    added = set()
    for name, value in values.items():
        if name not in sums:
            sums[name] = value
            added.add(id(value))
        elif id(sums[name]) not in added:
            sums[name].add_(value)
            added.add(id(sums[name]))
