"""What M links of rank r leave of a rank-R matrix, against the best that rank M·r can do.

Source: the residual picture of Chain of LoRA, arXiv 2401.04151, section 4, on the one problem where
everything is known. Fit ½‖T − X‖² with X = Σ B_k·A_k, one link of rank r after the other, each on
what the earlier ones left:

    exact      each link is the best rank-r fit of the residual, its top r singular triples. Greedy
               is then optimal: after M links the residual is that of Eckart and Young for rank M·r
    tuned      each link starts as LoRA does (A random, B = 0); gradient steps on both factors
    tuned FW   the same steps from A along the gradient's top right singular directions, where
               Frank–Wolfe would step (frank_wolfe.py)
    B only     A random and frozen, B tuned (RAC-LoRA): each link removes what a random
               r-dimensional subspace holds

What to look at: the chain of long links lies on the Eckart–Young line until the residual is small
(from B = 0 a weak direction grows slowly: the smaller its singular value, the longer the link must
be). Short links from random starts fall far behind it; from the gradient's directions even short
links lie on it. B only removes a random share of what is left, so it falls slowly however long a
link is.

Run: python examples/theory/residual.py [OUTPUT.png] [--small]
"""

from __future__ import annotations

import torch
from figures import run, save, subplots
from torch import Tensor

SIZE, TARGET_RANK, RANK, LINKS = 32, 16, 2, 12
LONG, SHORT = 400, 15  # steps a link
EARLY = 4  # links after which the table says what is left
SMALLEST = 1e-3  # where the figure ends
KINDS = ("exact", "tuned", "tuned FW", "B only")


def target() -> Tensor:
    """Return a matrix of rank R with singular values 1, 0.8, 0.8², …"""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(SIZE, TARGET_RANK, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return left @ torch.diag(0.8 ** torch.arange(TARGET_RANK, dtype=torch.float64)) @ right.T


def eckart_young(matrix: Tensor, num_links: int) -> list[float]:
    """Return ‖T − T_{k·r}‖ / ‖T‖ for k = 0 … links: no matrix of that rank is nearer."""
    squares = torch.linalg.svdvals(matrix) ** 2
    return [
        float((squares[k * RANK :].sum() / squares.sum()).clamp(min=0).sqrt())
        for k in range(num_links + 1)
    ]


def fit_link(residual: Tensor, kind: str, num_steps: int, generator: torch.Generator) -> Tensor:
    """Return B·A of one link fitted to `residual`, starting at B = 0."""
    if kind == "exact":
        u, s, vt = torch.linalg.svd(residual)
        return u[:, :RANK] @ torch.diag(s[:RANK]) @ vt[:RANK]
    a = torch.randn(RANK, residual.shape[1], generator=generator, dtype=residual.dtype)
    if kind == "tuned FW":  # the gradient at B = 0 is minus the residual
        a = torch.linalg.svd(residual).Vh[:RANK]
    a = torch.linalg.qr(a.T).Q.T  # orthonormal rows: one learning rate fits every start
    b = torch.zeros(residual.shape[0], RANK, dtype=residual.dtype)
    rate = 0.5  # the target's largest singular value is 1, so both factors' curvature stays near 1
    for _ in range(num_steps):
        error = b @ a - residual
        grad_a, grad_b = b.T @ error, error @ a.T
        b = b - rate * grad_b
        a = a if kind == "B only" else a - rate * grad_a
    return b @ a


def residuals(matrix: Tensor, kind: str, num_steps: int, num_links: int) -> list[float]:
    """Return ‖T − Σ B·A‖ / ‖T‖ after 0 … links."""
    generator = torch.Generator().manual_seed(1)
    left, found = matrix.clone(), [1.0]
    for _ in range(num_links):
        left = left - fit_link(left, kind, num_steps, generator)
        found.append(float(left.norm() / matrix.norm()))
    return found


def picture(output: str, found: dict[str, list[float]], num_links: int) -> None:
    """Draw the residuals after each link."""
    figure, axis = subplots(1, 1, (7.5, 4.8), layout="constrained")
    best = [max(value, SMALLEST) for value in eckart_young(target(), num_links)]
    axis.semilogy(best, "k-", linewidth=4, alpha=0.25, label="Eckart–Young, rank M·r")
    for name, values in found.items():
        line = "--" if f" {SHORT} " in name else "-"
        axis.semilogy([max(value, SMALLEST) for value in values], line, marker=".", label=name)
    axis.axvline(TARGET_RANK / RANK, color="black", linestyle=":", linewidth=0.8)
    axis.set(
        xlabel=f"links M of rank r = {RANK} (target: rank R = {TARGET_RANK}, dotted at M·r = R)",
        ylabel="‖T − Σ B·A‖ / ‖T‖",
        ylim=(SMALLEST, 2),
    )
    axis.legend(fontsize=8)
    save(figure, output)


def main(output: str, *, small: bool) -> None:
    """Tune every chain, print what is left, and draw it."""
    matrix, num_links = target(), LINKS // 2 if small else LINKS
    found = {"exact": residuals(matrix, "exact", LONG, num_links)}
    for steps in (LONG, SHORT):
        for kind in KINDS[1:]:
            name = f"{kind}, {steps} steps a link"
            found[name] = residuals(matrix, kind, steps, num_links)
    best = eckart_young(matrix, num_links)
    print(f"{'‖T − Σ B·A‖ / ‖T‖':28} after {EARLY} links   after {num_links} links")
    for name, values in (found | {"Eckart–Young": best}).items():
        print(f"{name:28} {values[EARLY]:13.4f}   {values[num_links]:14.2e}")
    picture(output, found, num_links)


if __name__ == "__main__":
    run(main, __doc__, "residual.png")
