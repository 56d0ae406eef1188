"""Equations of a combination: the rank-R update of a module that fits several states best.

Part j is a state: its total update ΔW_j, and rows on which the combined model should match it. For
a module with base weight W_0 [out, in], X̃_j [n_j tokens, in] are the inputs of the module in the
combined model on the rows of part j. T_j [n_j tokens, out] is what the update must add there to
give the output of the part's own model (`chain.solving`):

    G_j = w_j X̃_jᵀX̃_j / n_j,  λ_j = λ · mean diagonal of G_j,  S = Σ_j (G_j + λ_j I)
    K   = Σ_j (w_j T_jᵀX̃_j / n_j + λ_j ΔW_j),  ΔW = K S⁻¹
    S = L Lᵀ,  B = first R left singular vectors of ΔW L = K L⁻ᵀ,  A = Bᵀ ΔW

Where T_j = X_j (W_0 + ΔW_j)ᵀ − X̃_j W_0ᵀ, the sums are smaller without T_j:

    w_j T_jᵀX̃_j / n_j = (W_0 + ΔW_j) E_j + ΔW_j G_j,  E_j = w_j (X_j − X̃_j)ᵀX̃_j / n_j

w_j is the importance of a part. The last line is reduced-rank regression: the best update of rank R
for the same equations. In a direction without inputs, ΔW is the mean of the parts' updates with
weights λ_j; in a module without inputs, with weights w_j. A single part is returned unchanged up to
its rank. The base can be a part too, with ΔW = 0 and its own rows: it keeps what no stage trained.

Related work: RegMean (arXiv 2212.09849); layer by layer: RegMean++ (2508.03121); outputs of the
parts' own models with inputs of the combined model: IterIS (2411.15231).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from chainlora.chain.link import Factors
from chainlora.chain.low_rank import leading_left

RIDGE = 0.1  # λ, selected on the tuning seed of benchmarks/combining
_BLOCK = 192  # columns of a Gram matrix at a time, each from its diagonal down


@dataclass(frozen=True)
class Part:
    """A state to combine."""

    name: str  # for messages and results
    rows: Sequence[Sequence[int]]  # token ids on which the combined model should match this state
    update: Mapping[str, Factors]  # total ``B·A`` by module path, scalings in B; empty: the base
    importance: float = 1.0  # w_j


@dataclass(frozen=True)
class Combined:
    """A combination: factors by module path, all of one rank."""

    factors: dict[str, Factors]
    # Relative error of the rank-R update against the solution of full rank, in the norm of outputs.
    error: float
    # By part, relative distance of the input of the head from that in the part's own model, on the
    # rows of the part.
    distances: dict[str, float]


class Sums:
    """Sums over the tokens of one part, in float32 on the device of the inputs."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None  # X̃ᵀX̃ [in, in], the lower triangle
        self.shift: Tensor | None = None  # (X − X̃)ᵀX̃ [in, in]; X: inputs in the part's own model
        self.cross: dict[str, Tensor] = {}  # TᵀX̃ [out, in] by module

    def add(
        self, x: Tensor, targets: Mapping[str, Tensor] | None = None, own: Tensor | None = None
    ) -> None:
        """Add inputs X̃ [tokens, in] with T [tokens, out] by module, or X [tokens, in]."""
        if not x.numel():
            return
        x = x.float()
        if self.gram is None:
            self.gram = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            self.gram[start:, columns].addmm_(x[:, start:].T, x[:, columns])
        for name, target in (targets or {}).items():
            self.cross[name] = _plus(self.cross.get(name), target.float(), x)
        if own is not None:
            self.shift = _plus(self.shift, own.float() - x, x)

    def are_finite(self) -> bool:
        """Return whether all sums are finite."""
        sums = [self.gram, self.shift, *self.cross.values()]
        return all(bool(total.sum().isfinite()) for total in sums if total is not None)


class Solved(NamedTuple):
    """The best update of a rank for one module."""

    factors: Factors
    whole: float  # squared norm ‖ΔW·L‖_F² of the solution of full rank
    left_out: float  # squared norm of its difference from the update of the given rank


@dataclass
class Equations:
    """S and K of modules that share an input, summed over parts."""

    shift: Tensor | None = None  # Σ_j E_j [in, in]; its product with W_0 is to be added to K
    _s: Tensor | None = None  # [in, in], the lower triangle
    _k: dict[str, Tensor] = field(default_factory=dict)  # [out, in] by module
    _low: dict[str, list[Factors]] = field(default_factory=dict)  # products that belong to K
    _parts: list[tuple[Mapping[str, Factors], float]] = field(default_factory=list)

    def add(
        self, sums: Sums, num_tokens: int, updates: Mapping[str, Factors], importance: float = 1.0
    ) -> None:
        """Add a part with ΔW_j by module, and the sums over its n_j tokens."""
        self._parts.append((updates, importance))
        if sums.gram is None:
            return
        scale = importance / num_tokens
        gram = _wide(sums.gram, scale)
        diagonal = gram.diagonal()
        ridge = RIDGE * float(diagonal.mean())
        diagonal += ridge
        for name, cross in sums.cross.items():
            self.add_product(name, _wide(cross, scale))
        whole = gram if sums.cross else gram.tril() + gram.tril(-1).T
        if sums.shift is not None:
            shift = _wide(sums.shift, scale)
            whole += shift
            self.shift = shift if self.shift is None else self.shift.add_(shift)
        for name, update in updates.items():
            a, b = update.a.cpu().double(), update.b.cpu().double()
            a = ridge * a if sums.cross else a @ whole
            self._low.setdefault(name, []).append(Factors(a, b))
        self._s = gram if self._s is None else self._s.add_(gram)

    def add_product(self, name: str, product: Tensor) -> None:
        """Add to K of a module."""
        wide = product.cpu().double()
        self._k[name] = self._k[name].add_(wide) if name in self._k else wide

    def solve(self, rank: int) -> dict[str, Solved]:
        """Return the solution of each module; overwrites S."""
        if self._s is None or not self._s.diagonal().any():
            self._set_mean()
        assert self._s is not None
        root = torch.linalg.cholesky(self._s, out=self._s)
        for name, low in self._low.items():
            a, b = torch.cat([each.a for each in low]), torch.cat([each.b for each in low], 1)
            self.add_product(name, b @ a)
        return {name: _best_of_rank(k, root, rank) for name, k in self._k.items()}

    def _set_mean(self) -> None:
        """Set the equations of modules without inputs: ΔW is the weighted mean of the updates."""
        total = sum(importance for _, importance in self._parts)
        self._k, self._low = {}, {}
        for updates, importance in self._parts:
            for name, update in updates.items():
                a, b = update.a.cpu().double(), update.b.cpu().double() * (importance / total)
                self._low.setdefault(name, []).append(Factors(a, b))
                self._s = torch.eye(a.shape[1], dtype=torch.float64)


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _wide(total: Tensor, scale: float) -> Tensor:
    return total.cpu().double().mul_(scale)


def _best_of_rank(k: Tensor, root: Tensor, rank: int) -> Solved:
    """Return the best factors of a rank for K [out, in] and the Cholesky factor L of S."""
    weighted = torch.linalg.solve_triangular(root, k.T, upper=False).T  # ΔW L [out, in]
    b, kept = leading_left(weighted, rank)
    a = torch.cholesky_solve((b.T @ k).T, root).T
    whole = float(weighted.square().sum())
    factors = Factors(a.float().contiguous(), b.float().contiguous())
    return Solved(factors, whole, max(0.0, whole - kept))
