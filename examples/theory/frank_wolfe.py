"""Chain of LoRA as Frank–Wolfe: Theorem 4.1 checked on matrix completion.

Source: Algorithm 2 and Theorem 4.1 of arXiv 2401.04151. Over K = {W: ‖W‖_* ≤ R}, from W₁ = 0,

    V_t ∈ ε-argmin_{V ∈ K} ⟨V, ∇L(W_t)⟩         a link: over a trace-norm ball V has rank one
    W_{t+1} = W_t + η_t·(V_t − W_t)              a knot
    g_t = max_{V ∈ K} ⟨∇L(W_t), W_t − V⟩         the Frank–Wolfe gap: 0 just where W_t is stationary

With the singular values σ of ∇L this is V = −R·u₁·v₁ᵀ and g_t = ⟨∇L, W_t⟩ + R·σ₁. For L β-smooth
and 0 ≤ L ≤ M on K, K of diameter D, and η = √M / (D·√(β·T)) over T steps, the theorem says

    (1/T)·Σ g_t ≤ 2·√(M·β)·D/√T + ε

Its proof gives more. One step yields L(W_{t+1}) ≤ L(W_t) − η·(g_t − ε_t) + η²·β·D²/2; summed,

    (1/T)·Σ g_t ≤ M/(η·T) + η·β·D²/2 + ε = 1.5·√(M·β)·D/√T + ε

with ε the mean of the ε_t. With L(W₁) − L(W_{T+1}), which a run knows, in the place of M the same
sum is a bound without slack in M ("from run"). Two losses of the observed entries' errors e:

    least squares   ½·e²                   convex, β = 1, M ≤ ½·(R + ‖observed‖)²
    bounded         ½·e²/(1 + e²)          not convex, β = 1, M = half the number of entries

and two ways to take V: by a full SVD (ε = 0), and by power steps from a random start, few enough to
miss (ε_t is measured). The step 2/(t + 2) of convex Frank–Wolfe is beside it: for it
L(W_T) − min L ≤ 2·β·D²/(T + 1) (Jaggi 2013, Theorem 1).

Run: python examples/theory/frank_wolfe.py [OUTPUT.png] [--small]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from figures import run, save, subplots

SIZE, RANK, OBSERVED = 40, 5, 0.3  # a 40 × 40 matrix of rank 5, three entries in ten are seen
POWER_STEPS = 2
HORIZONS = (4, 16, 64, 256, 1024)
LOSSES = ("least squares", "bounded")


@dataclass(frozen=True)
class Problem:
    """Complete `truth` from the entries under `mask`, with ‖W‖_* at most `radius`."""

    truth: np.ndarray
    mask: np.ndarray
    radius: float
    kind: str
    smoothness: float = 1.0  # β: both losses have a second derivative of at most 1 in an entry

    @property
    def diameter(self) -> float:
        """Return D: R·u·vᵀ and −R·u·vᵀ are farthest apart."""
        return 2 * self.radius

    @property
    def bound(self) -> float:
        """Return M, an upper bound of L on K; L is never negative."""
        if self.kind == "bounded":
            return self.mask.sum() / 2
        return 0.5 * (self.radius + np.linalg.norm(self.mask * self.truth)) ** 2

    def loss(self, weight: np.ndarray) -> float:
        """Return L(W)."""
        squares = (self.mask * (weight - self.truth)) ** 2
        return 0.5 * float(np.sum(squares / (1 + squares) if self.kind == "bounded" else squares))

    def gradient(self, weight: np.ndarray) -> np.ndarray:
        """Return ∇L(W)."""
        error = self.mask * (weight - self.truth)
        return error / (1 + error**2) ** 2 if self.kind == "bounded" else error


def make_problem(kind: str) -> Problem:
    """Draw a matrix of low rank and the entries that are seen; R is its own trace norm."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(SIZE, RANK)) @ draw.normal(size=(RANK, SIZE)) / math.sqrt(RANK)
    radius = float(np.linalg.svd(truth, compute_uv=False).sum())
    return Problem(truth, draw.random((SIZE, SIZE)) < OBSERVED, radius, kind)


def rank_one_vertex(
    gradient: np.ndarray, radius: float, power_steps: int | None, draw: np.random.Generator
) -> tuple[np.ndarray, float, float]:
    """Return V, its ε, and σ₁ of the gradient.

    power_steps: None for the exact minimiser.
    """
    u, sigma, vt = np.linalg.svd(gradient)
    left, right = u[:, 0], vt[0]
    if power_steps is not None:
        right = draw.normal(size=gradient.shape[1])
        for _ in range(power_steps):
            left = gradient @ right
            left /= np.linalg.norm(left)
            right = gradient.T @ left
            right /= np.linalg.norm(right)
    vertex = -radius * np.outer(left, right)
    error = float(np.sum(vertex * gradient) + radius * sigma[0])
    return vertex, max(error, 0.0), float(sigma[0])  # below zero by rounding only


def theorem_step(problem: Problem, steps: int) -> Callable[[int], float]:
    """Return η of Theorem 4.1, the same at every step (and at most 1: W stays in K)."""
    rate = math.sqrt(problem.bound / (problem.smoothness * steps)) / problem.diameter
    return lambda _: min(rate, 1.0)


def convex_step(step: int) -> float:
    """Return 2/(t + 2), t from 0."""
    return 2 / (step + 2)


@dataclass(frozen=True)
class Run:
    """Gaps g_t, errors ε_t and losses L(W_t); losses has one more, the last W's."""

    gaps: np.ndarray
    errors: np.ndarray
    losses: np.ndarray
    weight: np.ndarray


def frank_wolfe(
    problem: Problem,
    steps: int,
    step_size: Callable[[int], float],
    power_steps: int | None = None,
) -> Run:
    """Run Algorithm 2 from W = 0."""
    draw = np.random.default_rng(1)
    weight, gaps, errors = np.zeros_like(problem.truth), [], []
    losses = [problem.loss(weight)]
    for step in range(steps):
        gradient = problem.gradient(weight)
        vertex, error, sigma = rank_one_vertex(gradient, problem.radius, power_steps, draw)
        gaps.append(float(np.sum(gradient * weight)) + problem.radius * sigma)
        errors.append(error)
        weight = weight + step_size(step) * (vertex - weight)
        losses.append(problem.loss(weight))
    return Run(np.array(gaps), np.array(errors), np.array(losses), weight)


@dataclass(frozen=True)
class Row:
    """One horizon T: the mean gap, what bounds it, and the mean gap of the step 2/(t + 2)."""

    kind: str
    steps: int
    power_steps: int | None
    gap: float
    epsilon: float
    theorem: float  # 2·√(Mβ)·D/√T + ε
    derived: float  # 1.5·√(Mβ)·D/√T + ε
    from_the_run: float  # (L(W₁) − L(W_{T+1}))/(η·T) + η·β·D²/2 + ε
    convex_gap: float
    least_convex_gap: float


def measure(problem: Problem, steps: int, power_steps: int | None) -> Row:
    """Run both step sizes for T steps."""
    size = theorem_step(problem, steps)
    run = frank_wolfe(problem, steps, size, power_steps)
    convex = frank_wolfe(problem, steps, convex_step, power_steps)
    unit = math.sqrt(problem.bound * problem.smoothness / steps) * problem.diameter
    epsilon = float(run.errors.mean())
    fallen = float(run.losses[0] - run.losses[-1])
    known = fallen / (size(0) * steps) + size(0) * problem.smoothness * problem.diameter**2 / 2
    return Row(
        problem.kind,
        steps,
        power_steps,
        float(run.gaps.mean()),
        epsilon,
        2 * unit + epsilon,
        1.5 * unit + epsilon,
        known + epsilon,
        float(convex.gaps.mean()),
        float(convex.gaps.min()),
    )


def slope(steps: list[int], gaps: list[float]) -> float:
    """Return the least-squares slope of log g over log T."""
    return float(np.polyfit(np.log(steps), np.log(gaps), 1)[0])


def picture(output: str, rows: list[Row], horizon: int) -> None:
    """Draw the mean gap against T for both losses, and one run's gap and loss against t."""
    figure, axes = subplots(1, 3, (14, 4.4), layout="constrained")
    for axis, kind in zip(axes, LOSSES, strict=False):
        exact = [row for row in rows if row.kind == kind and row.power_steps is None]
        power = [row for row in rows if row.kind == kind and row.power_steps is not None]
        steps = [row.steps for row in exact]
        for lines, field, form, color, label in (
            (exact, "theorem", "-", "k", "Theorem 4.1: 2·√(Mβ)·D/√T"),
            (exact, "derived", "--", "k", "derived: 1.5·√(Mβ)·D/√T"),
            (exact, "from_the_run", ":", "k", "from the run, M not used"),
            (exact, "gap", "o-", "#0969da", "η, exact V"),
            (power, "gap", "o--", "#54aeff", f"η, V by {POWER_STEPS} power steps"),
            (exact, "convex_gap", "s-", "#cf222e", "2/(t + 2)"),
        ):
            axis.loglog(steps, [getattr(r, field) for r in lines], form, color=color, label=label)
        axis.set(title=f"{kind} loss", xlabel="steps T", ylabel="mean gap (1/T)·Σ g_t")
    axes[1].legend(fontsize=8)
    problem = make_problem("least squares")
    for color, name, size in (
        ("#0969da", "η", theorem_step(problem, horizon)),
        ("#cf222e", "2/(t + 2)", convex_step),
    ):
        taken, at = frank_wolfe(problem, horizon, size), np.arange(1, horizon + 2)
        axes[2].loglog(at[:-1], taken.gaps, color=color, label=f"{name}: gap g_t")
        axes[2].loglog(at, taken.losses, ":", color=color, label=f"{name}: loss L(W_t)")
    times = np.arange(2, horizon + 2)
    jaggi = 2 * problem.smoothness * problem.diameter**2 / (times + 1)
    axes[2].loglog(times, jaggi, "k-", linewidth=0.8, label="2·β·D²/(t + 1)")
    axes[2].set(title=f"least squares, one run of {horizon} steps", xlabel="step t")
    axes[2].legend(fontsize=8)
    save(figure, output)


def main(output: str, *, small: bool) -> None:
    """Measure every horizon, print the table and draw the figure."""
    horizons = HORIZONS[:4] if small else HORIZONS
    rows = [
        measure(make_problem(kind), steps, power_steps)
        for kind in LOSSES
        for power_steps in (None, POWER_STEPS)
        for steps in horizons
    ]
    print(
        f"{'loss':14} {'V by':14} {'T':>5} {'mean gap':>9} {'ε':>7} {'2·√(Mβ)D/√T+ε':>14} "
        f"{'1.5·…':>8} {'from run':>9} {'2/(t+2): mean':>14} {'least':>8}"
    )
    for row in rows:
        way = "SVD" if row.power_steps is None else f"{row.power_steps} power steps"
        print(
            f"{row.kind:14} {way:14} {row.steps:5} {row.gap:9.1f} {row.epsilon:7.1f} "
            f"{row.theorem:14.1f} {row.derived:8.1f} {row.from_the_run:9.1f} "
            f"{row.convex_gap:14.1f} {row.least_convex_gap:8.1f}"
        )
    for kind in LOSSES:
        chosen = [row for row in rows if row.kind == kind and row.power_steps is None]
        steps = [row.steps for row in chosen]
        print(
            f"slope of log mean gap over log T, {kind}: "
            f"{slope(steps, [row.gap for row in chosen]):.2f} with η of the theorem (bound −0.50), "
            f"{slope(steps, [row.convex_gap for row in chosen]):.2f} with 2/(t + 2)"
        )
    picture(output, rows, horizons[-1])


if __name__ == "__main__":
    run(main, __doc__, "frank_wolfe.png")
