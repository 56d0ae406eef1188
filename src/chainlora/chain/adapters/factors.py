"""One module's share of a link."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's share of a link, float32 on the CPU: ``A`` (rank × in), ``B`` (out × rank).

    `bias` (out) is LoRA's own bias on B; `magnitude` (out) is DoRA's (arXiv 2402.09353). Of an
    embedding, A has a column for each token, and PEFT has names of its own for both.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    of_embedding: bool = False

    def __repr__(self) -> str:
        return f"<Factors: A {tuple(self.a.shape)}, B {tuple(self.b.shape)}>"

    @property
    def adds(self) -> bool:
        """Whether the layer computes anything else with them."""
        has_bias = self.bias is not None and bool(self.bias.any())
        return has_bias or bool(self.a.any() and self.b.any())


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
