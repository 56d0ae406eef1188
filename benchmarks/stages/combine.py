"""States combined in closed form: the weights whose outputs are nearest to each state's own outputs
on its own inputs (RegMean, arXiv 2212.09849), as one link of low rank, without training.

    W = W_0 + Σ_i s_i B_i A'_i,   A'_i = (Σ_j A_i^(j) Ĝ_j) (Σ_j Ĝ_j)⁻¹,
    Ĝ_j = G_j + λ (tr G_j / d) I

minimises Σ_j tr[(W − W_j) Ĝ_j (W − W_j)ᵀ]. G_j is the mean of x xᵀ over the inputs x of a layer in
state j; A_i^(j) is link i's A where state j contains the link, else 0. All in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig

Grams = Mapping[str, Tensor]  # by module, [in, in]


def gram_matrices(model: Any, names: Iterable[str], rows: Sequence[Sequence[int]]) -> Grams:
    """Return the mean of x xᵀ over the inputs of modules, for token rows, one row at a time."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: inputs[name].append(args[0].detach()[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in inputs]
    try:
        for start in range(0, len(rows), 32):
            with torch.no_grad():
                for row in rows[start : start + 32]:
                    model(input_ids=torch.tensor([list(row)]), use_cache=False)
            _add(sums, inputs, sum(map(len, rows)))
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _add(sums: dict[str, Tensor], inputs: Mapping[str, list[Tensor]], count: int) -> None:
    """Add what inputs give to the mean, and forget them; what layers share is computed once."""
    known: dict[int, Tensor] = {}
    for name, parts in inputs.items():
        place = parts[0].data_ptr()
        if place not in known:
            x = torch.cat(parts).double()
            known[place] = x.T @ x / count
        sums[name] = sums[name] + known[place] if name in sums else known[place]
    for parts in inputs.values():
        parts.clear()


def combine(states: Sequence[Sequence[Link]], grams: Sequence[Grams], ridge: float) -> Link:
    """Return one link that is the combination of states of links, given the Grams of each."""
    links = list({id(link): link for state in states for link in state}.values())
    holds = [[any(own is link for own in state) for state in states] for link in links]
    factors = {}
    for name in dict.fromkeys(name for link in links for name in link.factors):
        seen = [with_ridge(each[name], ridge) for each in grams]
        whole = torch.linalg.cholesky(torch.stack(seen).sum(0))
        a, b = [], []
        for link, held in zip(links, holds, strict=True):
            if name in link.factors:
                mine = torch.stack([g for g, h in zip(seen, held, strict=True) if h]).sum(0)
                own = link.factors[name].a.double() @ mine
                a.append(torch.cholesky_solve(own.T, whole).T)
                b.append(link.scaling * link.factors[name].b.double())
        factors[name] = Factors(torch.cat(a).float(), torch.cat(b, dim=1).float())
    return as_link(factors)


def with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """Return G + λ (tr G / d) I, float64."""
    gram = gram.double()
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def as_link(factors: Mapping[str, Factors]) -> Link:
    """Return factors as a link of scaling 1."""
    rank = max(each.a.shape[0] for each in factors.values())
    return Link(0, LinkConfig(rank=rank, alpha=float(rank)), dict(factors))
