"""One link of a chain, and sums of links: data and pure functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chainlora.chain.adapters import Factors
from chainlora.chain.low_rank import delta_weight
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError


@dataclass(frozen=True, slots=True)
class Link:
    """One trained LoRA of the chain, immutable, on the CPU in float32.

    `factors` maps module paths to A (rank × in) and B (out × rank). `config` is what the link was
    tuned with. The stored rank can be larger than the tuned one: a PiSSA link stores
    ``[B, −B₀]·[A; A₀]``, a link with soft knots the sum of what it tied on the way, compressed to
    the relative error `error`. `extra` holds the weights, by parameter path, of trained modules
    that are not LoRA.
    """

    index: int
    config: LinkConfig
    factors: dict[str, Factors]
    extra: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Rank of the stored factors."""
        return max((factors.a.shape[0] for factors in self.factors.values()), default=0)

    def delta_weight(self, module: str) -> Tensor:
        """Return ``s·B·A`` (out × in), float32."""
        return delta_weight(self.factors[module].a, self.factors[module].b, self.config.scaling)


def part_of(factors: Factors, rows: slice, bias_rows: slice, *, transposed: bool) -> Factors:
    """Return the factors of some rows of a weight, and of some entries of its bias.

    The rows of ``B·A`` are those of B. A layer that stores its weight (in × out) has the columns of
    A for rows; DoRA's magnitudes go with the rows of B.
    """
    bias = None if factors.bias is None else factors.bias[bias_rows]
    if transposed:
        return replace(factors, a=factors.a[:, rows], bias=bias)
    magnitude = None if factors.magnitude is None else factors.magnitude[rows]
    return Factors(factors.a, factors.b[rows], bias, magnitude)


def stack_links(links: Sequence[Link]) -> dict[str, Factors]:
    """Return one pair of factors a module with ``B·A = Σ s_j·B_j·A_j``.

    The rank is Σr, scalings are folded into B; a bias sums as ``Σ s_j·b_j``. Raises ChainError for
    DoRA links, whose update is not a low-rank sum.
    """
    stacked = {}
    for name in dict.fromkeys(name for link in links for name in link.factors):
        holders = [link for link in links if name in link.factors]
        terms = [(link.factors[name], link.config.scaling) for link in holders]
        if any(factors.magnitude is not None for factors, _ in terms):
            raise ChainError(
                f"DoRA links are not a low-rank sum (got one at {name}); "
                "export merged weights instead"
            )
        biases = [scaling * factors.bias for factors, scaling in terms if factors.bias is not None]
        stacked[name] = Factors(
            torch.cat([factors.a for factors, _ in terms]),
            torch.cat([scaling * factors.b for factors, scaling in terms], dim=1),
            torch.stack(biases).sum(0) if biases else None,
            of_embedding=any(factors.of_embedding for factors, _ in terms),
        )
    return stacked


def merge_(weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float) -> None:
    """Add ``s·B·A`` to a float32 `weight` (out × in), and LoRA's bias to `bias`, in place.

    The update of a row needs only that row of B, so a shard of rows is merged without the others.
    A DoRA link (arXiv 2402.09353, eq. 5) is not a sum: it rescales the rows of ``W + s·B·A`` to
    its magnitude.
    """
    weight.addmm_(factors.b.to(weight.device), factors.a.to(weight.device), alpha=scaling)
    if factors.magnitude is not None:
        norms = torch.linalg.norm(weight, dim=1)
        weight.mul_((factors.magnitude.to(weight.device) / norms).unsqueeze(1))
    if factors.bias is not None and bias is not None:
        bias.add_(factors.bias.to(weight.device), alpha=scaling)
