"""One module's share of a link."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
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
