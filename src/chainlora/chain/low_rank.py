"""Linear algebra of low-rank products ``B·A``, from their factors alone.

These functions avoid the dense [out, in] matrix: two thin QR decompositions leave a core of at most
rank × rank with the same singular values. A sum ``Σ s_j·B_j·A_j`` is also such a product, with
stacked factors (`chain.link.stack_links`). Norms and singular values are computed in float64 on the
factors' device; a core of a few hundred columns costs little compared with a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Fraction of a tolerance that truncation may use; rounding to float16 (about 2e-4) needs the rest.
_TRUNCATION_SHARE = 0.95
# Longest shorter side for a full SVD, which then takes well under a second.
_MOST_FOR_SVD = 640
# Longest shorter side for all eigenvectors, which then take some tenths of a second.
_MOST_FOR_EIGH = 1_024

Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the min(rank, in, out) largest singular values of ``B·A``, float64, descending."""
    a, b = a.double(), b.double()
    return torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)


def frobenius_norm(a: Tensor, b: Tensor) -> float:
    """Return ``‖B·A‖_F``."""
    return float(torch.linalg.norm(torch.linalg.qr(b.double()).R @ a.double()))


def randomized_svd(matrix: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading singular triplets of a matrix [m, n]: U [m, width], s [width], V [n, width].

    Uses a randomized range finder (arXiv 0909.4061), and leaves all random generators as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.svd_lowrank(matrix, q=width, niter=4)


def leading_left(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the leading left singular vectors of a matrix [m, n], and their squared values' sum.

    The vectors are [m, rank], or [m, n] if n is smaller; the sum is the squared Frobenius norm of
    their approximation. Decomposes the Gram matrix on the shorter side; beyond `_MOST_FOR_EIGH` a
    randomized SVD takes over.
    """
    small = min(matrix.shape)
    rank = min(rank, small)
    if small > _MOST_FOR_EIGH:
        u, s, _ = randomized_svd(matrix, min(rank + 32, small), seed=0)
        return u[:, :rank], float(s[:rank].square().sum())
    is_wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if is_wide else matrix.T @ matrix
    values, vectors = _eigenvectors(gram)
    kept, u = float(values[-rank:].clamp(min=0).sum()), vectors[:, -rank:]
    return (u if is_wide else torch.linalg.qr(matrix @ u).Q), kept


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Call `eigh` with one thread: on busy cores several threads take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(gram)
    finally:
        torch.set_num_threads(threads)


def best_of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of ``B·A`` of at most a rank: A [rank, in] and B [out, rank].

    By Eckart–Young these are the leading singular triplets, in the dtype of the factors; A and B
    get the square root of each singular value.
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * (vh[:rank] @ right.Q.T), left.Q @ u[:, :rank] * root


def compress_together(
    matrix: Callable[[str], Tensor], names: Sequence[str], tolerance: float
) -> tuple[dict[str, Pair], float]:
    """Approximate several dense matrices [out, in], float32, by factors of one common rank.

    The rank is the smallest with ``√(Σ‖M − B·A‖² / Σ‖M‖²) ≤ tolerance``. Calls `matrix` with one
    name after the other, so that one matrix is in memory at a time. Returns A [rank, in] and
    B [out, rank] by name, and their relative error. The factors are float32; their values are
    rounded to float16 if the tolerance allows it.
    """
    leading = {name: _leading_triplets(matrix(name), tolerance) for name in names}
    total = sum(triplets.tail(0) for triplets in leading.values())
    longest = max(len(triplets.s) for triplets in leading.values())
    tails = [sum(t.tail(rank) for t in leading.values()) for rank in range(longest + 1)]
    allowed = (_TRUNCATION_SHARE * tolerance) ** 2 * total
    enough = [rank for rank in range(1, longest) if tails[rank] <= allowed]
    rank = enough[0] if enough else longest
    pairs = {name: triplets.factors(rank) for name, triplets in leading.items()}
    if not total:
        return pairs, 0.0
    narrow = {name: (a.half().float(), b.half().float()) for name, (a, b) in pairs.items()}
    rounding = sum(_distance(pairs[name], narrow[name]) ** 2 for name in names)
    error = math.sqrt((tails[rank] + rounding) / total)
    if error <= tolerance:  # not so for values beyond float16, whose error is infinite or NaN
        return narrow, error
    return pairs, math.sqrt(tails[rank] / total)


def _distance(one: Pair, other: Pair) -> float:
    """Return ``‖B·A − B'·A'‖_F``; QR keeps it accurate when the two products nearly cancel."""
    a = torch.cat([one[0].double(), other[0].double()])
    return frobenius_norm(a, torch.cat([one[1].double(), -other[1].double()], dim=1))


class _Triplets(NamedTuple):
    """The leading singular triplets of a matrix."""

    u: Tensor  # [out, k]
    s: Tensor  # [k]
    vh: Tensor  # [k, in]
    beyond: float  # squared norm of the matrix minus these triplets

    def tail(self, rank: int) -> float:
        """Return the squared error of an approximation by the first `rank` triplets."""
        return float(self.s[rank:].double().square().sum()) + self.beyond

    def first(self, rank: int) -> _Triplets:
        """Return the first `rank` triplets as copies, so that the others can be freed."""
        u, s, vh = self.u[:, :rank].clone(), self.s[:rank].clone(), self.vh[:rank].clone()
        return _Triplets(u, s, vh, self.tail(rank))

    def factors(self, rank: int) -> Pair:
        """Return A [rank, in] and B [out, rank], padded with zeros if `rank` exceeds k."""
        root, missing = self.s[:rank].sqrt(), max(rank - len(self.s), 0)
        a = functional.pad(root.unsqueeze(1) * self.vh[:rank], (0, 0, 0, missing))
        b = functional.pad(self.u[:, :rank] * root, (0, missing))
        return a.contiguous(), b.contiguous()


def _leading_triplets(matrix: Tensor, tolerance: float) -> _Triplets:
    """Return the fewest triplets with a relative error of at most `_TRUNCATION_SHARE · tolerance`.

    Small matrices get a full SVD, large ones a randomized SVD whose width doubles until the error
    is small enough.
    """
    total, shorter = float(matrix.double().square().sum()), min(matrix.shape)
    allowed = (_TRUNCATION_SHARE * tolerance) ** 2 * total
    width = shorter if shorter <= _MOST_FOR_SVD else 32
    while width < shorter:
        u, s, v = randomized_svd(matrix, width, 0)
        triplets = _Triplets(u, s, v.T, max(total - float(s.double().square().sum()), 0.0))
        if triplets.beyond <= allowed:
            break
        width *= 2
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        triplets = _Triplets(u, s, vh, 0.0)
    ranks = range(1, len(triplets.s))
    return triplets.first(next((k for k in ranks if triplets.tail(k) <= allowed), len(triplets.s)))


def numerical_rank(s: Tensor, size: int) -> int:
    """Return the number of singular values above float32 rounding, the precision of stored factors.

    `s` is descending, `size` the longer side of the matrix.
    """
    return int((s > s[:1] * size * torch.finfo(torch.float32).eps).sum())


def effective_rank(s: Tensor) -> float:
    """Return exp(entropy of σ/Σσ) (Roy & Vetterli 2007); 0 if all singular values are zero."""
    s = s.double()
    total = s.sum()
    return float(torch.special.entr(s / total).sum().exp()) if total > 0 else 0.0


def stable_rank(s: Tensor) -> float:
    """Return ``‖·‖_F² / ‖·‖₂²`` from singular values s: at least 1, or 0 if all are zero."""
    s = s.double()
    top = s.max()
    return float((s / top).square().sum()) if top > 0 else 0.0


def subspace_overlap(a: Tensor, other: Tensor) -> float:
    """Return the mean squared cosine of the angles between two row spaces [rank, in].

    ``‖Q_1ᵀ·Q_2‖_F² / min(r_1, r_2)`` with orthonormal bases Q (φ of the LoRA paper, arXiv
    2106.09685 §7.2). The result is in [0, 1]: 1 if one space contains the other, 0 if they are
    orthogonal or a matrix is zero, max(r_1, r_2)/in on average if both are random.
    """
    first, second = row_basis(a), row_basis(other)
    smaller = min(first.shape[0], second.shape[0])
    return min(1.0, float((first @ second.T).square().sum()) / smaller) if smaller else 0.0


def row_basis(a: Tensor) -> Tensor:
    """Return orthonormal rows [numerical rank, in] that span the row space of A [rank, in]."""
    _, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    # Factors are float32 or narrower: singular values below that rounding are noise.
    return vh[: numerical_rank(s, max(a.shape))]
