"""The equations of a combination: what update of a module suits several states at once, best of a
rank.

Each part j is a state, by its total update ΔW_j, with rows for which it answers. For a module with
base weight W_0 (out × in), X̃_j are its inputs in the combined model (n_j tokens × in) for rows of
part j, and T_j is what its update must add to give what the part's own model gives
(`chain.solving`):

    G_j = w_j X̃_jᵀX̃_j / n_j,  λ_j = λ · mean diagonal of G_j,  S = Σ_j (G_j + λ_j I)
    K   = Σ_j (w_j T_jᵀX̃_j / n_j + λ_j ΔW_j),  ΔW = K S⁻¹
    S = L Lᵀ,  B = first R left singular vectors of ΔW L = K L⁻ᵀ,  A = Bᵀ ΔW

w_j is the importance of a part. The last line is reduced-rank regression: of all updates of rank R
the best for the same equations. In a direction that no row has, ΔW is the mean of the parts'
updates weighted by λ_j; in a module that no row reaches, by w_j. One part alone is itself. The base
is a part too, by ΔW = 0 and rows of its own: without it nothing holds what no part was taught.

Kin: RegMean (arXiv 2212.09849); layer by layer, RegMean++ (2508.03121); outputs of the parts' own
models and inputs of the combined one, IterIS (2411.15231).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from chainlora.chain.link import Factors
from chainlora.chain.low_rank import leading_left

RIDGE = 0.1  # λ, chosen on the tuning seed of benchmarks/combining


@dataclass(frozen=True)
class Part:
    """A state, by its total update (A times B, its scalings in B), with the rows of tokens for
    which it answers. The base has no update."""

    name: str
    rows: Sequence[Sequence[int]]
    update: Mapping[str, Factors]
    importance: float = 1.0


@dataclass(frozen=True)
class Combined:
    """A combination: factors by module, all of one rank.

    `error` is what the rank leaves out of the solution of any rank, a share of its norm in the
    inputs. `distances` say how far the hidden states that enter the head are from those of each
    part's own model, on its rows, a share of their norm.
    """

    factors: dict[str, Factors]
    error: float
    distances: dict[str, float]


class Sums:
    """Products over the tokens of one part: X̃ᵀX̃ (in × in), and TᵀX̃ (out × in) by module.

    They are computed in float32, and added in float64 on the CPU.
    """

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: dict[str, Tensor] = {}

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add tokens: inputs (tokens × in), and by module what is to be added (tokens × out)."""
        if not x.numel():  # an expert that no token was sent to
            return
        x = x.float()
        self.gram = _plus(self.gram, x.T @ x)
        for name, target in targets.items():
            self.cross[name] = _plus(self.cross.get(name), target.float().T @ x)

    def are_finite(self) -> bool:
        """Say whether all that was added is."""
        sums = [*self.cross.values()] if self.gram is None else [self.gram, *self.cross.values()]
        return all(bool(each.sum().isfinite()) for each in sums)


class Solved(NamedTuple):
    """Factors of the best update of a rank; squared norms, in the inputs, of the update of any rank
    and of what is left out of it."""

    factors: Factors
    whole: float
    left_out: float


@dataclass
class Equations:
    """S and K of modules that share an input, over the parts that were added."""

    _s: Tensor | None = None
    _k: dict[str, Tensor] = field(default_factory=dict)
    _parts: list[tuple[Mapping[str, Factors], float]] = field(default_factory=list)

    def add(
        self, sums: Sums, num_tokens: int, updates: Mapping[str, Factors], importance: float = 1.0
    ) -> None:
        """Add a part: its sums, which are used up, the number of its tokens, and its updates."""
        self._parts.append((updates, importance))
        if sums.gram is None:
            return
        gram = sums.gram.mul_(importance / num_tokens)
        diagonal = gram.diagonal()
        ridge = RIDGE * float(diagonal.mean())
        diagonal += ridge
        for name, cross in sums.cross.items():
            cross = cross.mul_(importance / num_tokens)
            if name in updates:
                _add_update(cross, updates[name], ridge)
            self._k[name] = self._k[name].add_(cross) if name in self._k else cross
        self._s = gram if self._s is None else self._s.add_(gram)

    def solve(self, rank: int) -> dict[str, Solved]:
        """Return the solution of each module; the sums are used up."""
        if self._s is None or not self._s.diagonal().any():
            self._without_inputs()
        assert self._s is not None
        root = torch.linalg.cholesky(self._s, out=self._s)
        return {name: _best_of_rank(k, root, rank) for name, k in self._k.items()}

    def _without_inputs(self) -> None:
        total = sum(importance for _, importance in self._parts)
        self._k = {}
        for updates, importance in self._parts:
            for name, each in updates.items():
                shape = each.b.shape[0], each.a.shape[1]
                mean = self._k.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                _add_update(mean, each, importance / total)
                self._s = torch.eye(shape[1], dtype=torch.float64)


def _plus(total: Tensor | None, product: Tensor) -> Tensor:
    found = product.cpu().double()
    return found if total is None else total.add_(found)


def _add_update(total: Tensor, factors: Factors, scale: float) -> None:
    total.addmm_(factors.b.cpu().double(), factors.a.cpu().double(), alpha=scale)


def _best_of_rank(k: Tensor, root: Tensor, rank: int) -> Solved:
    """Return the best factors of a rank for K and the Cholesky factor of S."""
    seen = torch.linalg.solve_triangular(root, k.T, upper=False).T  # ΔW L
    b, kept = leading_left(seen, rank)
    a = torch.cholesky_solve((b.T @ k).T, root).T
    whole = float(seen.square().sum())
    factors = Factors(a.float().contiguous(), b.float().contiguous())
    return Solved(factors, whole, max(0.0, whole - kept))
