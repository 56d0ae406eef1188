"""States combined in closed form (RegMean, arXiv 2212.09849): the weights whose outputs are nearest
to those of each state on inputs of its rows.

    W = W_0 + Σ_i B_i A'_i,   A'_i = (Σ_j A_i^(j) Ĝ_j) (Σ_j Ĝ_j)⁻¹,   Ĝ_j = G_j + λ (tr G_j / d) I

minimises Σ_j tr[(W − W_j) Ĝ_j (W − W_j)ᵀ]. G_j is the mean of x xᵀ over the inputs x of a layer,
for rows of state j; A_i^(j) is A of link i in state j, times its strength there, and 0 where the
state is without the link. Each link keeps its B and its rank. The ridge λ stands in both sums: then
one state combined is itself, and a direction that no state has seen gets the mean of the updates,
weighted by tr G_j. A module that no row reaches gets their sum.

Computed again with inputs x in the combination, this is the first iteration of IterIS (arXiv
2411.15231), but for its targets: outputs of each state on its own inputs. RegMean++ (2508.03121)
and Chain of Merges (2508.21421) take inputs in the combination layer by layer.

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
Place = tuple[str, str]
"""A link and a module of it."""


class Combination:
    """The sums over states for modules that share an input; `add` each state, then `solve`."""

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self._whole: Tensor | None = None  # Σ_j Ĝ_j
        self._parts: dict[Place, Tensor] = {}  # Σ_j A_i^(j) Ĝ_j
        self._known: dict[Place, Tensor] = {}  # A of links

    def add(self, gram: Tensor | None, factors: Mapping[Place, Tensor]) -> None:
        """Add a state: the Gram of its input, which is used up, None where the modules have none;
        and A of its links (rank × in)."""
        self._known = {**factors, **self._known}
        if gram is None:
            return
        diagonal = gram.diagonal()
        diagonal += self.ridge * diagonal.mean()  # λ (tr G / d) I
        for place, a in factors.items():
            part = a.double() @ gram
            self._parts[place] = self._parts[place] + part if place in self._parts else part
        self._whole = gram if self._whole is None else self._whole.add_(gram)

    def solve(self) -> dict[Place, Tensor]:
        """Return A' (rank × in, float32) of each link; A where no state has an input."""
        whole = self._whole
        if whole is None or not whole.diagonal().any():
            return self._known
        torch.linalg.cholesky(whole, out=whole)  # in place: it is not needed any more
        found = {}
        for place, a in self._known.items():
            part = self._parts.get(place)
            if part is None:  # only states without the link use the modules
                found[place] = torch.zeros_like(a)
            else:
                found[place] = torch.cholesky_solve(part.T, whole).T.float().contiguous()
        return found


def gram_matrices(
    model: nn.Module, modules: Iterable[str], rows: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return the mean of x xᵀ (float64) over the inputs of modules for rows of tokens (1 × length).

    It is (in × in); none of a module that no row reaches.
    Rows are read one by one, without padding. Raises ChainError for inputs that are not finite.
    """
    layers = {name: base_layer(model.get_submodule(name)) for name in modules}
    sums: dict[str, Tensor] = {}
    count = pending = 0
    called = _calling(model, layers.values())
    with _kept_inputs(layers) as inputs, torch.no_grad():
        for row in rows:
            called(input_ids=row, use_cache=False)
            count, pending = count + row.numel(), pending + row.numel()
            if pending >= _AT_ONCE:
                _add_products(sums, inputs)
                pending = 0
        _add_products(sums, inputs)
    for name, total in sums.items():
        if not total.div_(count).diagonal().isfinite().all():  # what else is not, has one there
            raise ChainError("inputs of a layer must be finite", f"others of {name}")
    return sums


def modules_by_input(
    model: nn.Module, modules: Collection[str], row: Tensor
) -> Iterable[list[str]]:
    """Return modules, those that share an input for a row of tokens (1 × length) together."""
    found: dict[object, list[str]] = {}
    layers = {name: base_layer(model.get_submodule(name)) for name in modules}
    with _kept_inputs(layers) as inputs, torch.no_grad():
        model(input_ids=row, use_cache=False)
        for name, parts in inputs.items():
            same = tuple((part.data_ptr(), part.shape, part.stride()) for part in parts)
            found.setdefault(same or name, []).append(name)
    return found.values()


def _calling(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """Return the part of a causal language model that calls layers, without its head if it can."""
    body = base_model(model)
    inside = {*body.modules()}
    return body if all(layer in inside for layer in layers) else model


@contextmanager
def _kept_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what layers are called with."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(_keeper(inputs[name])))
        yield inputs


_AT_ONCE = 2048  # tokens whose inputs wait for one product


def _keeper(kept: list[Tensor]) -> Any:
    return lambda module, args: kept.append(args[0].detach())


def _add_products(sums: dict[str, Tensor], inputs: Mapping[str, list[Tensor]]) -> None:
    """Add what inputs give to the sums, and forget them."""
    for name, parts in inputs.items():
        if parts:  # else an expert that no token was sent to
            product = _product(parts)
            sums[name] = sums[name].add_(product) if name in sums else product
        parts.clear()


def _product(parts: list[Tensor]) -> Tensor:
    x = torch.cat([part.flatten(0, -2) for part in parts]).cpu()
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half the time of float64
    return (x.T @ x).double()
