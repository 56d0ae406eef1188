"""Updates merged without data: their mean (task arithmetic, arXiv 2212.04089), TIES (2306.01708).

TIES is PEFT's: of each update the largest entries by magnitude, the sign of the larger total, and
the mean of the entries of that sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.merge_utils import ties as merge_ties
from torch import Tensor

from chainlora import Link
from chainlora.chain.adapters import is_transposed

Rows = Mapping[str, Sequence[Sequence[int]]]
Links = Mapping[str, Sequence[Link]]
DENSITY = 0.2  # of the paper


def mean(model: Any, links: Links, rows: Rows, scale: float = 1.0) -> dict[str, Tensor]:
    """Return the mean of updates, times a scale."""
    share = scale / len(links)
    return {n: torch.stack(each).sum(0) * share for n, each in _by_module(links)}


def ties(model: Any, links: Links, rows: Rows, scale: float = 1.0) -> dict[str, Tensor]:
    """Return updates merged by TIES, times a scale, module by module."""
    weights = torch.full((len(links),), scale)
    return {name: merge_ties(each, weights, DENSITY) for name, each in _by_module(links)}


def sums(links: Sequence[Link], modules: Sequence[str]) -> dict[str, Tensor]:
    """Return the update of links that stand on each other."""
    return {
        name: torch.stack([link.delta_weight(name) for link in links]).sum(0) for name in modules
    }


def _by_module(links: Links) -> Iterator[tuple[str, list[Tensor]]]:
    for name in next(iter(links.values()))[0].factors:
        yield name, [sums(own, [name])[name] for own in links.values()]


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
