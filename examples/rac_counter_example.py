"""The problem on which LoRA and a chain of LoRA fail and RAC-LoRA cannot: rank 1 on a 3 × 3
quadratic.

Source: RAC-LoRA, arXiv 2410.08305, section 3: M = diag(10, 1, 1); the start below is ours. Minimise

    f(X) = ½ ⟨X, M X⟩,   X = X₀ + Σ B·A with A (1 × 3), B (3 × 1),   X₀ = c·I,

whose least value is 0 at X = 0. X₀ has rank three: rank 1 must be spent three times at least. Three
methods take the same number of plain gradient steps at the same rate from the same draws of A
(length 1; B = 0):

    LoRA       one (A, B) for all steps
    chain      a fresh (A, B) every `LINK` steps, both trained, tied into X
    RAC-LoRA   a fresh A every `LINK` steps, frozen; only B is trained

With A frozen the problem in B is a convex quadratic of curvature at most ‖M‖·‖A‖² = 10, wherever X
is: any rate under 0.2 converges, and f never rises. With both trained there is no such number: the
curvature in A is that of ‖B‖², and B grows with the distance still to go. So a rate that is safe
near the minimum (c = 1: the chain does reach zero, and LoRA stops at the best rank-1 correction)
blows up from further away (c = 5). Scale-free optimizers such as AdamW hide this; the theory of
plain gradient descent does not survive it.

Run: python examples/rac_counter_example.py [OUTPUT.png]
"""

from __future__ import annotations

import sys

import numpy as np

M = np.diag([10.0, 1.0, 1.0])
STEPS, LINK, DRAWS, RATE = 600, 20, 40, 0.05
METHODS = {
    "lora": "LoRA, rank 1",
    "chain": f"chain, {LINK} steps a link",
    "rac": "RAC-LoRA, B only",
}


def loss(x: np.ndarray) -> float:
    """Return ½ ⟨X, M X⟩."""
    return 0.5 * float(np.sum(x * (M @ x)))


def tune(method: str, seed: int, start: float, rate: float = RATE) -> np.ndarray:
    """Return f / f(X₀) after each step from X₀ = start · I; infinite from where it left all bounds.

    method: "lora", "chain" or "rac".
    """
    draw = np.random.default_rng(seed)
    x, losses = start * np.eye(3), np.full(STEPS, np.inf)
    first, (a, b) = loss(x), fresh(draw)
    for step in range(STEPS):
        if step and step % LINK == 0 and method != "lora":
            x = x + b @ a  # tie a knot
            a, b = fresh(draw)  # extend the chain
        gradient = M @ (x + b @ a)
        if method == "rac":
            b = b - rate * gradient @ a.T
        else:
            a, b = a - rate * b.T @ gradient, b - rate * gradient @ a.T
        losses[step] = loss(x + b @ a) / first
        if not losses[step] < 1e6:
            losses[step:] = np.inf
            break
    return losses


def fresh(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a random direction A (1 × 3) of length 1 and B = 0 (3 × 1)."""
    a = draw.normal(size=(1, 3))
    return a / np.linalg.norm(a), np.zeros((3, 1))


def best_of_rank_one() -> float:
    """Return the least f / f(X₀) that one rank-1 correction can reach: the steepest direction
    removed."""
    return float(np.sum(np.diag(M)[1:]) / np.trace(M))


def main(output: str = "rac_counter_example.png") -> dict[tuple[str, float], tuple[float, float]]:
    """Draw the losses; return, by (method, c), the share of draws that left all bounds and the
    worst last loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(11, 6), sharex=True, sharey=True, layout="constrained"
    )
    found = {}
    for row, start in zip(axes, (1.0, 5.0), strict=True):
        for axis, (method, title) in zip(row, METHODS.items(), strict=True):
            curves = np.array([tune(method, seed, start) for seed in range(DRAWS)])
            axis.semilogy(
                np.where(np.isfinite(curves), curves, np.nan).T,
                color="#0969da",
                alpha=0.3,
                linewidth=0.8,
            )
            axis.axhline(best_of_rank_one(), color="#cf222e", linestyle=":", label="best of rank 1")
            lost = float(np.mean(np.isinf(curves[:, -1])))
            axis.set(title=f"{title}, c = {start:g}: {lost:.0%} diverge", ylim=(1e-9, 1e6))
            found[method, start] = (lost, float(curves[:, -1].max()))
        row[0].set_ylabel("f(X) / f(X₀)")
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(output, dpi=150)
    plt.close(figure)
    return found


if __name__ == "__main__":
    for (name, distance), (share, worst) in main(*sys.argv[1:]).items():
        print(
            f"{name:6} from {distance:g}·I: {share:4.0%} diverge, worst last loss {worst:.2g} of "
            "the first"
        )
