"""Links of a chain and sums of links: data and pure functions, without a model."""

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
    """Factors of one module's update ``s·B·A``, float32 on the CPU."""

    a: Tensor  # A [rank, in]
    b: Tensor  # B [out, rank]
    bias: Tensor | None = None  # LoRA's own bias on B [out] (`lora_bias`)

    def __repr__(self) -> str:
        return f"<Factors: A {tuple(self.a.shape)}, B {tuple(self.b.shape)}>"

    @property
    def adds(self) -> bool:
        """Whether these factors change the output of their layer."""
        has_bias = self.bias is not None and bool(self.bias.any())
        return has_bias or bool(self.a.any() and self.b.any())


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """One trained LoRA of a chain, immutable, float32 on the CPU.

    It adds ``c·s·B·A`` to the weight of each module: strength times scaling times factors. The
    stored rank can exceed the tuned rank: a link with soft knots stores the compressed sum of all
    shares that it tied.

    Args:
        index: place in the chain, from 0.
        config: settings that the link was tuned with.
        factors: A [rank, in] and B [out, rank] by module path.
        num_steps: number of optimizer steps.
        error: relative error of the stored update (Frobenius norm); 0 without soft knots.
        id: permanent number of the link in its chain, never given to another link; by default the
            index.
        strength: c; 0 switches the link off.
    """

    index: int
    config: LinkConfig
    factors: dict[str, Factors]
    num_steps: int = 0
    error: float = 0.0
    id: int = -1
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", Shown(self.factors))
        if self.id < 0:
            object.__setattr__(self, "id", self.index)

    def __repr__(self) -> str:
        strength = "" if self.strength == 1 else f" at strength {self.strength:g}"
        size = f"rank {self.rank} on {len(self.factors)} modules"
        return f"<Link {self.id}: {size}, {self.num_steps} steps{strength}>"

    @property
    def rank(self) -> int:
        """Rank of the stored factors."""
        return max((factors.a.shape[0] for factors in self.factors.values()), default=0)

    @property
    def scaling(self) -> float:
        """Factor in front of B·A: strength times the scaling that the link was tuned with."""
        return self.strength * self.config.scaling

    def delta_weight(self, module: str) -> Tensor:
        """Return ``c·s·B·A`` [out, in] of a module, float32.

        Raises:
            KeyError: the link does not adapt this module.
        """
        return self.scaling * (self.factors[module].b @ self.factors[module].a)


def stacked(one: Factors, other: Factors) -> Factors:
    """Return factors of ``one + other``, of ranks r_1 + r_2; the bias comes from `one`."""
    return replace(one, a=torch.cat([one.a, other.a]), b=torch.cat([one.b, other.b], dim=1))


def padded(factors: Factors, rank: int) -> Factors:
    """Pad factors with zeros to a rank: links, and servers such as vLLM, need one rank."""
    missing = rank - factors.a.shape[0]
    if missing <= 0:
        return factors
    return replace(
        factors,
        a=functional.pad(factors.a, (0, 0, 0, missing)),
        b=functional.pad(factors.b, (0, missing)),
    )


def switched_on(links: Sequence[Link]) -> list[Link]:
    """Return the links that add something to the weights."""
    return [link for link in links if link.strength]


def stack_links(links: Sequence[Link]) -> dict[str, Factors]:
    """Return one pair of factors per module with ``B·A = Σ c_j·s_j·B_j·A_j``.

    The rank is the sum of the ranks of all links that are switched on. B contains strength and
    scaling; the bias is ``Σ c_j·s_j·b_j``.

    Raises:
        ChainError: the links belong to models of different shapes.
    """
    active = switched_on(links)
    stacked: Shown[Factors] = Shown()
    for name in dict.fromkeys(name for link in active for name in link.factors):
        terms = [(link.factors[name], link.scaling) for link in active if name in link.factors]
        shapes = {f"{factors.b.shape[0]} × {factors.a.shape[1]}" for factors, _ in terms}
        if len(shapes) > 1:
            got = f"updates of {' and '.join(sorted(shapes))} at {name}"
            raise ChainError("links must belong to one model", got, "take the links of one run")
        biases = [scaling * factors.bias for factors, scaling in terms if factors.bias is not None]
        stacked[name] = Factors(
            torch.cat([factors.a for factors, _ in terms]),
            torch.cat([scaling * factors.b for factors, scaling in terms], dim=1),
            torch.stack(biases).sum(0) if biases else None,
        )
    return stacked


def stacked_rank(links: Sequence[Link]) -> int:
    """Return the largest sum of ranks of a module, over all links, switched on or off."""
    ranks: dict[str, int] = {}
    for link in links:
        for name, factors in link.factors.items():
            ranks[name] = ranks.get(name, 0) + factors.a.shape[0]
    return max(ranks.values(), default=0)
