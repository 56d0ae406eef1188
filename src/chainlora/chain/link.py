"""One link of a chain, and sums of links: data and pure functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.showing import Shown


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's share of a link, float32 on the CPU: ``A`` (rank × in), ``B`` (out × rank).

    `bias` (out) is LoRA's own bias on B.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None

    def __repr__(self) -> str:
        return f"<Factors: A {tuple(self.a.shape)}, B {tuple(self.b.shape)}>"

    @property
    def adds(self) -> bool:
        """Whether the layer computes anything else with them."""
        has_bias = self.bias is not None and bool(self.bias.any())
        return has_bias or bool(self.a.any() and self.b.any())


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """One trained LoRA of the chain, immutable, on the CPU in float32.

    Its part of the weights is ``c·s·B·A``: strength times scaling times factors. `factors` maps
    module paths to A (rank × in) and B (out × rank). `config` is what the link was tuned with. The
    stored rank can be larger than the tuned one: a PiSSA link stores ``[B, −B₀]·[A; A₀]``, a link
    with soft knots the sum of what it tied on the way, compressed to the relative error `error`.

    `index` is its place in the chain, from 0. `id` names it for good: no other link of its chain
    gets the same one, even after this link was dropped.
    """

    index: int
    config: LinkConfig
    factors: dict[str, Factors]
    num_steps: int = 0
    error: float = 0.0
    id: int = -1  # by default, the index
    strength: float = 1.0  # 0: switched off

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", Shown(self.factors))
        if self.id < 0:
            object.__setattr__(self, "id", self.index)

    def __repr__(self) -> str:
        at = "" if self.strength == 1 else f" at strength {self.strength:g}"
        size = f"rank {self.rank} on {len(self.factors)} modules"
        return f"<Link {self.id}: {size}, {self.num_steps} steps{at}>"

    @property
    def rank(self) -> int:
        """Rank of the stored factors."""
        return max((factors.a.shape[0] for factors in self.factors.values()), default=0)

    @property
    def scaling(self) -> float:
        """Factor in front of B·A: strength times the scaling that the link was tuned with."""
        return self.strength * self.config.scaling

    def delta_weight(self, module: str) -> Tensor:
        """Return ``c·s·B·A`` (out × in), float32, of a module by path; KeyError for any other."""
        return self.scaling * (self.factors[module].b @ self.factors[module].a)


def stacked(one: Factors, other: Factors) -> Factors:
    """Return factors of the sum of two products; what is beside A and B is that of the first."""
    return replace(one, a=torch.cat([one.a, other.a]), b=torch.cat([one.b, other.b], dim=1))


def padded(factors: Factors, rank: int) -> Factors:
    """Widen factors with zeros to a rank (a link, vLLM and others have one rank an adapter)."""
    missing = rank - factors.a.shape[0]
    if missing <= 0:
        return factors
    return replace(
        factors,
        a=functional.pad(factors.a, (0, 0, 0, missing)),
        b=functional.pad(factors.b, (0, missing)),
    )


def part_of(factors: Factors, rows: slice, bias_rows: slice, *, transposed: bool) -> Factors:
    """Return the factors of some rows of a weight, and of some entries of its bias.

    The rows of ``B·A`` are those of B. A layer that stores its weight (in × out) has the columns of
    A for rows.
    """
    bias = None if factors.bias is None else factors.bias[bias_rows]
    if transposed:
        return replace(factors, a=factors.a[:, rows], bias=bias)
    return Factors(factors.a, factors.b[rows], bias)


def switched_on(links: Sequence[Link]) -> list[Link]:
    """Return the links that add something to the weights."""
    return [link for link in links if link.strength]


def stack_links(links: Sequence[Link]) -> dict[str, Factors]:
    """Return one pair of factors a module with ``B·A = Σ c_j·s_j·B_j·A_j``.

    The rank is Σr of the links that are switched on, scalings are folded into B; a bias sums as
    ``Σ c_j·s_j·b_j``. Raises ChainError for links of models of other shapes.
    """
    held = switched_on(links)
    stacked: Shown[Factors] = Shown()
    for name in dict.fromkeys(name for link in held for name in link.factors):
        terms = [(link.factors[name], link.scaling) for link in held if name in link.factors]
        shapes = {f"{factors.b.shape[0]} × {factors.a.shape[1]}" for factors, _ in terms}
        if len(shapes) > 1:
            raise ChainError(
                "links of a chain must be of one model (got updates of "
                f"{' and '.join(sorted(shapes))} at {name}); take the links of one run"
            )
        biases = [scaling * factors.bias for factors, scaling in terms if factors.bias is not None]
        stacked[name] = Factors(
            torch.cat([factors.a for factors, _ in terms]),
            torch.cat([scaling * factors.b for factors, scaling in terms], dim=1),
            torch.stack(biases).sum(0) if biases else None,
        )
    return stacked


def stacked_rank(links: Sequence[Link]) -> int:
    """Return the largest Σr of a module, over all links, switched on or off."""
    ranks: dict[str, int] = {}
    for link in links:
        for name, factors in link.factors.items():
            ranks[name] = ranks.get(name, 0) + factors.a.shape[0]
    return max(ranks.values(), default=0)


def merge_(weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float) -> None:
    """Add ``s·B·A`` to a wide `weight` (out × in), and LoRA's bias to `bias`, in place.

    The update of a row needs only that row of B, so a shard of rows is merged without the others.
    """
    weight.addmm_(factors.b.to(weight), factors.a.to(weight), alpha=scaling)
    if factors.bias is not None and bias is not None:
        bias.add_(factors.bias.to(weight), alpha=scaling)
