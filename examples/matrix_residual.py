"""The matrix case: what M links of rank r leave of a rank-R target, against the best that rank M·r
can do.

Source: the residual picture of Chain of LoRA, arXiv 2401.04151, section 4, on the one problem where
everything is known. Fit ½‖T − X‖² with X = Σ B_k·A_k, one link of rank r after the other, each on
what the earlier ones left:

    exact      each link is the best rank-r fit of the residual: its top r singular triples. Greedy
    is then optimal:
               after M links the residual is that of Eckart and Young for rank M·r, to the last
               digit
    tuned      each link starts as LoRA does (A random, B = 0) and is tuned by gradient steps, both
    factors tuned FW   the same steps, A starting along the top right singular directions of the
    gradient (Frank–Wolfe) B only     A random and frozen, B tuned (RAC-LoRA): a random
    r-dimensional projection of the residual per link

What to look at: the chain of long links lies on the Eckart–Young line until the residual is small
(from B = 0 a weak direction grows slowly: the time of a link is what its smallest singular value
asks for); short links from random starts fall far behind it; from the gradient's directions even
short links lie on it. B only removes a random share of what is left, so it goes down slowly however
long a link is.

Run: python examples/matrix_residual.py [OUTPUT.png]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

SIZE, TARGET_RANK, RANK, LINKS = 32, 16, 2, 12
LONG, SHORT = 400, 15  # steps a link
KINDS = ("exact", "tuned", "tuned FW", "B only")


def target(seed: int = 0) -> Tensor:
    """Return a matrix of rank R whose singular values fall geometrically from 1, each 0.8 of the
    one before."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(SIZE, TARGET_RANK, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return left @ torch.diag(0.8 ** torch.arange(TARGET_RANK, dtype=torch.float64)) @ right.T


def eckart_young(matrix: Tensor, num_links: int, rank: int) -> list[float]:
    """Return ‖T − T_{k·r}‖ / ‖T‖ for k = 0 … links: no matrix of that rank is nearer."""
    squares = torch.linalg.svdvals(matrix) ** 2
    return [
        float((squares[k * rank :].sum() / squares.sum()).clamp(min=0).sqrt())
        for k in range(num_links + 1)
    ]


def fit_link(
    residual: Tensor, kind: str, rank: int, num_steps: int, generator: torch.Generator
) -> Tensor:
    """Return B·A of one link (rank `rank`) fitted to `residual`, starting at B = 0."""
    if kind == "exact":
        u, s, vt = torch.linalg.svd(residual)
        return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
    a = torch.randn(rank, residual.shape[1], generator=generator, dtype=residual.dtype)
    if kind == "tuned FW":  # the gradient at B = 0 is minus the residual
        a = torch.linalg.svd(residual).Vh[:rank]
    a = torch.linalg.qr(a.T).Q.T  # orthonormal rows: one learning rate fits every start
    b = torch.zeros(residual.shape[0], rank, dtype=residual.dtype)
    rate = 0.5  # the target's largest singular value is 1, so both factors' curvature stays near 1
    for _ in range(num_steps):
        error = b @ a - residual
        grad_a, grad_b = b.T @ error, error @ a.T
        b = b - rate * grad_b
        a = a if kind == "B only" else a - rate * grad_a
    return b @ a


def residuals(
    matrix: Tensor,
    kind: str,
    num_steps: int = LONG,
    *,
    num_links: int = LINKS,
    rank: int = RANK,
    seed: int = 1,
) -> list[float]:
    """Return ‖T − Σ B·A‖ / ‖T‖ after 0 … links."""
    generator = torch.Generator().manual_seed(seed)
    left, found = matrix.clone(), [1.0]
    for _ in range(num_links):
        left = left - fit_link(left, kind, rank, num_steps, generator)
        found.append(float(left.norm() / matrix.norm()))
    return found


def main(output: str = "matrix_residual.png") -> dict[str, list[float]]:
    """Draw the residuals and return them by kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matrix = target()
    found = {
        f"{kind}, {steps} steps a link" if kind != "exact" else kind: residuals(matrix, kind, steps)
        for steps in (LONG, SHORT)
        for kind in KINDS
        if kind != "exact" or steps == LONG
    }
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.semilogy(
        [max(value, 1e-9) for value in eckart_young(matrix, LINKS, RANK)],
        "k-",
        linewidth=4,
        alpha=0.25,
        label="Eckart–Young, rank M·r",
    )
    for name, values in found.items():
        axis.semilogy(
            [max(value, 1e-9) for value in values],
            "--" if f" {SHORT} " in name else "-",
            marker=".",
            label=name,
        )
    axis.axvline(TARGET_RANK / RANK, color="black", linestyle=":", linewidth=0.8)
    axis.set(
        xlabel=f"links M of rank r = {RANK} (target: rank R = {TARGET_RANK}, dotted at M·r = R)",
        ylabel="‖T − Σ B·A‖ / ‖T‖",
        ylim=(1e-9, 2),
    )
    axis.legend(fontsize=8)
    figure.savefig(output, dpi=150)
    plt.close(figure)
    return found


if __name__ == "__main__":
    for name, values in main(*sys.argv[1:]).items():
        half = len(values) // 3
        print(
            f"{name:28} residual after {half} links {values[half]:.4f}, after {LINKS} links "
            f"{values[-1]:.2e}"
        )
    print(
        f"{'Eckart-Young':28} residual after {half} links "
        f"{eckart_young(target(), half, RANK)[-1]:.4f}"
    )
