"""Linear algebra of low-rank products ``B·A``, from their factors alone.

The dense out × in matrix is never formed: two thin QR decompositions leave a core no larger than
rank × rank, which has the same singular values. A sum ``Σ s_j·B_j·A_j`` is such a product, its
factors stacked (`chain.link.stack_links`). All of it runs in float64 on the factors' device; a core
of a few hundred columns costs nothing beside a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_LEFT_OUT = 0.95  # of a tolerance; the rest is for rounding to float16, some 2e-4 of a sum
_DECOMPOSED_WHOLE = 640  # shorter side; a full decomposition then takes well under a second

_SOLVED_WHOLE = 1_024  # smaller side; eigenvectors of all of it then take some tenths of a second

Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the min(rank, in, out) leading singular values of ``B·A``, float64, descending."""
    a, b = a.double(), b.double()
    return torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)


def frobenius_norm(a: Tensor, b: Tensor) -> float:
    """Return ``‖B·A‖_F``."""
    return float(torch.linalg.norm(torch.linalg.qr(b.double()).R @ a.double()))


def randomized_svd(matrix: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(U, s, V)`` of a matrix's leading `width` singular triplets, by a randomized range
    finder (arXiv 0909.4061). The generators of all devices stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=width, niter=4)
    return u, s, v


def leading_left(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return a matrix's first left singular vectors (rows × rank or less), and the squared norm of
    what they keep. By eigenvectors of its smaller side; of a large one by a randomized range."""
    small = min(matrix.shape)
    rank = min(rank, small)
    if small > _SOLVED_WHOLE:
        u, s, _ = randomized_svd(matrix, min(rank + 32, small), seed=0)
        return u[:, :rank], float(s[:rank].square().sum())
    is_wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if is_wide else matrix.T @ matrix
    values, vectors = _eigenvectors(gram)
    kept, u = float(values[-rank:].clamp(min=0).sum()), vectors[:, -rank:]
    return (u if is_wide else torch.linalg.qr(matrix @ u).Q), kept


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """By one thread: several wait for each other, on busy cores six times as long as one needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(gram)
    finally:
        torch.set_num_threads(threads)
    return values, vectors


def best_of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of `rank` or less whose product is closest to that of A and B as given, all
    in the precision of these.

    By Eckart–Young, the leading singular triplets, their values split evenly between A and B.
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * (vh[:rank] @ right.Q.T), left.Q @ u[:, :rank] * root


def compress_together(
    matrix: Callable[[str], Tensor], names: Sequence[str], tolerance: float
) -> tuple[dict[str, Pair], float]:
    """Return low-rank factors of several dense matrices, all of one rank, and their relative error.

    The rank is the least that brings ``√(Σ‖M − B·A‖² / Σ‖M‖²)`` to `tolerance` or below. `matrix`
    gives one matrix [out, in] float32 by name; at most one is in memory at a time. The factors are
    float32, with values that float16 holds too unless that would break the tolerance.
    """
    leading = {name: _leading_triplets(matrix(name), tolerance) for name in names}
    total = sum(triplets.tail(0) for triplets in leading.values())
    longest = max(len(triplets.s) for triplets in leading.values())
    tails = [sum(t.tail(rank) for t in leading.values()) for rank in range(longest + 1)]
    allowed = (_LEFT_OUT * tolerance) ** 2 * total
    enough = [rank for rank in range(1, longest) if tails[rank] <= allowed]
    rank = enough[0] if enough else longest
    pairs = {name: triplets.factors(rank) for name, triplets in leading.items()}
    if not total:
        return pairs, 0.0
    narrow = {name: (a.half().float(), b.half().float()) for name, (a, b) in pairs.items()}
    rounding = sum(_distance(pairs[name], narrow[name]) ** 2 for name in names)
    error = math.sqrt((tails[rank] + rounding) / total)
    if error <= tolerance:  # false for what is beyond float16 as well
        return narrow, error
    return pairs, math.sqrt(tails[rank] / total)


def _distance(one: Pair, other: Pair) -> float:
    """Return ``‖B·A − B'·A'‖_F``; by QR it is accurate also where the two nearly cancel."""
    a = torch.cat([one[0].double(), other[0].double()])
    return frobenius_norm(a, torch.cat([one[1].double(), -other[1].double()], dim=1))


class _Triplets(NamedTuple):
    """The leading singular triplets of a matrix."""

    u: Tensor  # [out, k]
    s: Tensor  # [k]
    vh: Tensor  # [k, in]
    beyond: float  # squared norm of what these leave out

    def tail(self, rank: int) -> float:
        """Return the squared norm of what the first `rank` triplets leave out."""
        return float(self.s[rank:].double().square().sum()) + self.beyond

    def first(self, rank: int) -> _Triplets:
        """Return the first `rank` triplets, without the memory of the others."""
        u, s, vh = self.u[:, :rank].clone(), self.s[:rank].clone(), self.vh[:rank].clone()
        return _Triplets(u, s, vh, self.tail(rank))

    def factors(self, rank: int) -> Pair:
        """Return A [rank, in] and B [out, rank], padded with zeros."""
        root, missing = self.s[:rank].sqrt(), max(rank - len(self.s), 0)
        a = functional.pad(root.unsqueeze(1) * self.vh[:rank], (0, 0, 0, missing))
        b = functional.pad(self.u[:, :rank] * root, (0, missing))
        return a.contiguous(), b.contiguous()


def _leading_triplets(matrix: Tensor, tolerance: float) -> _Triplets:
    """Return as many singular triplets as leave out at most `tolerance` of the norm, less what
    `_LEFT_OUT` keeps for rounding.

    Small matrices are decomposed whole. Of large ones the width doubles until it is enough.
    """
    total, shorter = float(matrix.double().square().sum()), min(matrix.shape)
    allowed = (_LEFT_OUT * tolerance) ** 2 * total
    width = shorter if shorter <= _DECOMPOSED_WHOLE else 32
    while True:
        if width >= shorter:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            found = _Triplets(u, s, vh, 0.0)
        else:
            u, s, v = randomized_svd(matrix, width, 0)
            beyond = max(total - float(s.double().square().sum()), 0.0)
            found = _Triplets(u, s, v.T, beyond)
        if width >= shorter or found.beyond <= allowed:
            break
        width *= 2
    ranks = range(1, len(found.s))
    return found.first(next((k for k in ranks if found.tail(k) <= allowed), len(found.s)))


def numerical_rank(s: Tensor, size: int) -> int:
    """Return how many singular values s of a matrix, whose longer side is `size`, are above the
    rounding of float32, which factors are stored in."""
    return int((s > s[:1] * size * torch.finfo(torch.float32).eps).sum())


def effective_rank(s: Tensor) -> float:
    """Return exp(entropy of σ/Σσ) of singular values (Roy & Vetterli 2007), 0 if all are zero."""
    s = s.double()
    total = s.sum()
    return float(torch.special.entr(s / total).sum().exp()) if total > 0 else 0.0


def stable_rank(s: Tensor) -> float:
    """Return ``‖·‖_F² / ‖·‖₂²`` from singular values s; at least 1, 0 if all are zero."""
    s = s.double()
    top = s.max()
    return float((s / top).square().sum()) if top > 0 else 0.0


def subspace_overlap(a: Tensor, other: Tensor) -> float:
    """Return the mean squared cosine of the angles between two row spaces [rank, in].

    ``‖Q_1ᵀ·Q_2‖_F² / min(r_1, r_2)`` with orthonormal bases Q (φ of the LoRA paper, arXiv
    2106.09685 §7.2). In [0, 1]: 1 if one space holds the other, 0 if they are orthogonal, max(r_1,
    r_2)/in on average if both are random. A matrix of zeros spans nothing; its overlap is 0.
    """
    first, second = row_basis(a), row_basis(other)
    smaller = min(first.shape[0], second.shape[0])
    return min(1.0, float((first @ second.T).square().sum()) / smaller) if smaller else 0.0


def row_basis(a: Tensor) -> Tensor:
    """Return orthonormal rows [rank, in] that span the row space, null directions left out."""
    _, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    # The factors were float32 or narrower: what lies below their rounding is no direction of theirs
    return vh[: numerical_rank(s, max(a.shape))]
