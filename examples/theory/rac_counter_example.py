"""A 3 × 3 quadratic on which LoRA and a chain of LoRA fail at a rate that is safe for RAC-LoRA.

Source: RAC-LoRA, arXiv 2410.08305, section 3: rank 1 and M = diag(10, 1, 1). The start X₀ below is
ours. Minimise

    f(X) = ½·⟨X, M·X⟩,   X = X₀ + Σ B·A with A (1 × 3), B (3 × 1),   X₀ = c·I,

whose least value is 0 at X = 0. X₀ has rank three, so rank 1 must be spent at least three times.
Three methods take equally many plain gradient steps from the same draws of A (length 1) and B = 0:

    LoRA       one (A, B) for all steps
    chain      a new (A, B) every `LINK` steps, both trained, tied into X
    RAC-LoRA   a new A every `LINK` steps, frozen; only B is trained

With A frozen the problem in B is a convex quadratic of curvature at most ‖M‖·‖A‖² = 10, wherever X
is: below a rate of 0.2 f never rises. With both trained there is no such number: the curvature in A
is that of ‖B‖², and B grows with the distance still to go. So a rate that is safe near the minimum
(c = 1: the chain does reach zero, LoRA stops at the best rank-1 correction) diverges from further
away (c = 5). A smaller rate helps again, but how small depends on c: the last panel shows the
largest rate at which none of the draws diverges, near 0.16/c for LoRA and the chain.

Adam's steps do not grow with the gradient: with it the chain reaches zero from both starts. The
counter-example is one to the theory of gradient descent; that LoRA stops at rank one remains.

Run: python examples/theory/rac_counter_example.py [OUTPUT.png] [--small]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from figures import run, save, subplots

M = np.diag([10.0, 1.0, 1.0])
STEPS, LINK, DRAWS, RATE = 600, 20, 40, 0.05
METHODS = {"lora": "LoRA", "chain": "chain", "rac": "RAC-LoRA"}
COLOURS = {"lora": "#57606a", "chain": "#cf222e", "rac": "#0969da"}
ADAM_RATE = 0.2
STARTS = (1.0, 5.0)
DISTANCES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LIMIT = 1e6  # a loss above this multiple of the first has diverged


def loss(x: np.ndarray) -> np.ndarray:
    """Return ½·⟨X, M·X⟩ of each draw's X (draws, 3, 3)."""
    return 0.5 * np.sum(x * (M @ x), axis=(1, 2))


def fresh(draw: np.random.Generator, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random directions A (draws, 1, 3) of length 1 and B = 0 (draws, 3, 1)."""
    a = draw.normal(size=(draws, 1, 3))
    return a / np.linalg.norm(a, axis=2, keepdims=True), np.zeros((draws, 3, 1))


class Adam:
    """Adam for one factor, its rate falling linearly to zero over the run."""

    def __init__(self, rate: float, steps: int, done: int) -> None:
        self.rate, self.steps, self.done, self.count = rate, steps, done, 0
        self.first, self.second = np.zeros(1), np.zeros(1)

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to subtract."""
        falling = self.rate * (1 - (self.done + self.count) / self.steps)
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean = self.first / (1 - 0.9**self.count)
        return falling * mean / (np.sqrt(self.second / (1 - 0.999**self.count)) + 1e-12)


def tune(
    method: str,
    start: float,
    rate: float = RATE,
    *,
    steps: int = STEPS,
    draws: int = DRAWS,
    adam: bool = False,
) -> np.ndarray:
    """Return f / f(X₀) after each step from X₀ = start·I (steps, draws); infinite once it diverged.

    method: "lora", "chain" or "rac". adam: instead of plain gradient steps, new in each link.
    """
    draw = np.random.default_rng(0)
    x = np.tile(start * np.eye(3), (draws, 1, 1))
    first, (a, b) = loss(x), fresh(draw, draws)
    losses, lost = np.empty((steps, draws)), np.zeros(draws, dtype=bool)
    step_a, step_b = (optimizer(rate, steps, 0, adam=adam) for _ in range(2))
    for step in range(steps):
        if step and step % LINK == 0 and method != "lora":
            x = x + b @ a  # tie a knot
            a, b = fresh(draw, draws)  # extend the chain
            step_a, step_b = (optimizer(rate, steps, step, adam=adam) for _ in range(2))
        gradient = M @ (x + b @ a)
        grad_a, grad_b = b.transpose(0, 2, 1) @ gradient, gradient @ a.transpose(0, 2, 1)
        a = a if method == "rac" else a - step_a(grad_a)
        b = b - step_b(grad_b)
        found = loss(x + b @ a) / first
        lost |= ~(found < LIMIT)
        x[lost], a[lost], b[lost] = 0, 0, 0  # keep what diverged out of the arithmetic
        losses[step] = np.where(lost, np.inf, found)
    return losses


def optimizer(rate: float, steps: int, done: int, *, adam: bool) -> Callable:
    """Return a function from the gradient to what is subtracted."""
    return Adam(rate, steps, done) if adam else lambda gradient: rate * gradient


def best_of_rank_one() -> float:
    """Return the least f / f(X₀) of one rank-1 correction: the steepest direction removed."""
    return float(np.sum(np.diag(M)[1:]) / np.trace(M))


def largest_safe_rate(method: str, start: float, *, steps: int, draws: int) -> float:
    """Return the largest rate 0.2/2^(k/2) with which no draw diverges."""
    for half_powers in range(40):
        rate = 0.199 / 2 ** (half_powers / 2)  # 0.2 itself neither converges nor diverges
        if np.isfinite(tune(method, start, rate, steps=steps, draws=draws)[-1]).all():
            return rate
    raise RuntimeError(f"no safe rate for {method} from {start}")


def picture(
    output: str, curves: dict, safe: dict[str, list[float]], distances: tuple[float, ...]
) -> None:
    """Draw each method's losses from both starts, and the safe rates against the distance."""
    figure, axes = subplots(2, 4, (14, 6), layout="constrained")
    for row, start in zip(axes, STARTS, strict=True):
        for axis, (method, title) in zip(row, METHODS.items(), strict=False):
            found = curves[method, start]
            shown = np.where(np.isfinite(found), found, np.nan)
            axis.semilogy(shown, color=COLOURS[method], alpha=0.3, linewidth=0.8)
            axis.axhline(best_of_rank_one(), color="black", linestyle=":", label="best of rank 1")
            lost = np.isinf(found[-1]).mean()
            axis.set(
                title=f"{title}, c = {start:g}: {lost:.0%} diverge",
                xlim=(0, len(found) if lost < 1 else 12),
                ylim=(1e-9, LIMIT),
                xlabel="step",
                ylabel="f(X) / f(X₀)",
            )
            axis.title.set_fontsize(10)
    axes[0, 0].legend()
    grid = axes[0, 3].get_gridspec()
    axes[0, 3].remove()
    axes[1, 3].remove()
    axis = figure.add_subplot(grid[:, 3])
    for method, rates in safe.items():
        look = {"marker": "s", "markersize": 9} if method == "lora" else {"marker": "o"}
        axis.loglog(distances, rates, color=COLOURS[method], label=METHODS[method], **look)
    axis.set(title="largest rate without divergence", xlabel="distance c, X₀ = c·I", ylabel="rate")
    axis.axhline(RATE, color="black", linewidth=0.8, linestyle="--", label="rate of the curves")
    axis.legend(fontsize=8)
    save(figure, output, dots_per_inch=90)


def main(output: str, *, small: bool) -> None:
    """Draw and print the losses and the safe rates."""
    steps, draws = (200, 10) if small else (STEPS, DRAWS)
    distances = DISTANCES[1:4] if small else DISTANCES
    curves = {
        (method, start): tune(method, start, steps=steps, draws=draws)
        for start in STARTS
        for method in METHODS
    }
    for (method, start), losses in curves.items():
        print(
            f"{method:6} from {start:g}·I at rate {RATE:g}: {np.isinf(losses[-1]).mean():4.0%} "
            f"diverge, worst last loss {losses[-1].max():.2g} of the first"
        )
    for start in STARTS:
        last = {
            method: tune(method, start, ADAM_RATE, steps=steps, draws=draws, adam=True)[-1].max()
            for method in METHODS
        }
        print(
            f"with Adam at rate {ADAM_RATE:g}, from {start:g}·I, worst last loss: "
            + ", ".join(f"{method} {worst:.2g}" for method, worst in last.items())
        )
    safe = {
        method: [largest_safe_rate(method, c, steps=steps, draws=draws) for c in distances]
        for method in METHODS
    }
    print(f"{'c':28}" + "".join(f"{c:>9g}" for c in distances))
    for method, rates in safe.items():
        print(f"largest safe rate, {method:9}" + "".join(f"{rate:>9.2g}" for rate in rates))
    picture(output, curves, safe, distances)


if __name__ == "__main__":
    run(main, __doc__, "rac_counter_example.png")
