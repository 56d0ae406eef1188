"""Rank-1 least squares under Adam, with the knots that soft_knots.py explains and compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIZE, BATCH, SCALE = 32, 8, 2.0  # m = n; inputs a step; s = alpha / rank as most configs have it
INTERVAL = 5
BETA_1, BETA_2 = 0.9, 0.999  # Adam's defaults
EPSILON = 1e-12  # below every gradient here, so that Adam is free of scale
FLOAT = torch.float64


# --- what differs between the arms


@dataclass(frozen=True)
class Arm:
    """What happens at a knot.

    kind: "none" (no knots), "soft" (fold 1 − ρ), "rescale" (fold nothing, ρ = 1) or "chain" (fold
        everything, then a new A and B = 0).
    balances: both factors leave a soft knot with one norm; otherwise each shrinks by √ρ.
    ties: what is folded goes into W₀; otherwise B·A just shrinks, which is decay.
    moments: "carried" exactly, "unscaled" (left as they are) or "new".
    grid: what is tried beside the learning rate: "tau", "lambda" (LoRA+: rate of B over that of A),
        "one tau" or "".
    """

    kind: str
    grid: str = "tau"
    balances: bool = True
    ties: bool = True
    moments: str = "carried"
    follows_soft_knots: bool = False  # rescale to the norms that soft knots have at that step
    small_start: bool = False  # a chain's new A has the norm √(‖A‖·‖B‖) of the pair just tied
    balanced_rates: bool = False  # the rate of B over that of A at λ = y/x, see above
    rank: int = 1


ARMS = {
    "LoRA": Arm("none", grid=""),
    "LoRA, best ratio of rates": Arm("none", grid="lambda"),
    "LoRA turning as soft knots do": Arm("rescale", grid="one tau", follows_soft_knots=True),
    "balancing only": Arm("rescale", grid=""),
    "decay, not tied": Arm("soft", ties=False),
    "folding only": Arm("soft", balances=False),
    "soft knots": Arm("soft"),
    "soft knots, moments unscaled": Arm("soft", moments="unscaled"),
    "soft knots, new moments": Arm("soft", moments="new"),
    "classic chain": Arm("chain", moments="new"),
    "classic chain, small new A": Arm("chain", moments="new", small_start=True),
    "LoRA at balance's ratio": Arm("none", grid="", balanced_rates=True),
    "folding only at balance's ratio": Arm("soft", balances=False, balanced_rates=True),
    "classic chain at balance's ratio": Arm("chain", moments="new", balanced_rates=True),
    "LoRA, rank 4": Arm("none", grid="", rank=4),
}


# --- the problem


class Problem(NamedTuple):
    """One least-squares problem a seed; tensors have the seeds in front."""

    seeds: tuple[int, ...]
    target: Tensor  # W* (seeds, m, n)
    root: Tensor  # C = root · rootᵀ (seeds, n, n)
    inputs: Tensor  # (steps, seeds, n, batch)
    noise: Tensor  # of the outputs (steps, seeds, m, batch)


def make_problem(
    seeds: tuple[int, ...],
    steps: int,
    *,
    rank: int = SIZE,
    condition: float = 1.0,
    size: float = 1.0,
    noise: float = 1.0,
) -> Problem:
    """Draw targets with singular values size/i, i ≤ rank, and inputs whose C has this condition.

    noise: its variance over that of the outputs W*·x.
    """
    parts = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        u, v, q = (
            torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw, dtype=FLOAT)).Q
            for _ in range(3)
        )
        singular = size / torch.arange(1, SIZE + 1, dtype=FLOAT)
        singular[rank:] = 0
        target = u @ torch.diag(singular) @ v.T
        variances = torch.logspace(0, -math.log10(condition), SIZE, dtype=FLOAT)
        root = q @ torch.diag((variances / variances.mean()).sqrt())
        inputs = root @ torch.randn(steps, SIZE, BATCH, generator=draw, dtype=FLOAT)
        spread = (noise * (target @ root).square().sum() / SIZE).sqrt()
        noises = spread * torch.randn(steps, SIZE, BATCH, generator=draw, dtype=FLOAT)
        parts.append((target, root, inputs, noises))
    target, root, inputs, noises = zip(*parts, strict=True)
    by_step = (torch.stack(inputs, 1), torch.stack(noises, 1))
    return Problem(seeds, torch.stack(target), torch.stack(root), *by_step)


def floor(problem: Problem, rank: int) -> Tensor:
    """Return the least f / f(0) that a change of this rank reaches, one number a seed."""
    squares = torch.linalg.svdvals(problem.target @ problem.root) ** 2
    return squares[:, rank:].sum(1) / squares.sum(1)


# --- the live pair, its knots, and Adam


@dataclass
class Pair:
    """The live factors beside what is tied; tensors are (rates, seeds, …)."""

    base: Tensor  # W₀ (…, m, n)
    a: Tensor  # (…, rank, n)
    b: Tensor  # (…, m, rank)
    scale: Tensor  # s (…, 1, 1)
    moments: list[Tensor]  # m_A, v_A, m_B, v_B
    count: int = 0  # Adam's steps so far

    def weight(self) -> Tensor:
        """Return W₀ + s·B·A."""
        return self.base + self.scale * (self.b @ self.a)

    def forget(self) -> None:
        """Start Adam anew."""
        self.moments = [torch.zeros_like(part) for part in (self.a, self.a, self.b, self.b)]
        self.count = 0


def norms(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return ‖A_i‖ and ‖B_i‖ of each component, as (…, rank, 1)."""
    return pair.a.norm(dim=-1, keepdim=True), pair.b.norm(dim=-2, keepdim=True).mT


def shrink_factors(pair: Pair, rho: float, *, balances: bool = True) -> tuple[Tensor, Tensor]:
    """Return α and β with α·β = ρ; a component with a zero factor is left alone."""
    x, y = norms(pair)
    if not balances:
        return torch.full_like(x, math.sqrt(rho)), torch.full_like(x, math.sqrt(rho))
    alive = (x > 0) & (y > 0)
    t = (rho * x * y).sqrt()
    one = torch.ones_like(x)
    return torch.where(alive, t / x, one), torch.where(alive, t / y, one)


def scale_pair(pair: Pair, alpha: Tensor, beta: Tensor, scale: Tensor, moments: str) -> None:
    """Make A ← αA, B ← βB, s ← scale, with Adam's moments carried as the gradients change.

    The gradient of A is s·Bᵀ·∇f: it changes by β·(new s)/(old s), that of B by α·(new s)/(old s).
    """
    by_a, by_b = beta * scale / pair.scale, (alpha * scale / pair.scale).mT
    pair.a, pair.b, pair.scale = alpha * pair.a, beta.mT * pair.b, scale
    if moments == "carried":
        m_a, v_a, m_b, v_b = pair.moments
        pair.moments = [by_a * m_a, by_a**2 * v_a, by_b * m_b, by_b**2 * v_b]
    if moments == "new":
        pair.forget()


def soft_knot(pair: Pair, rho: float, arm: Arm) -> None:
    """Tie the share 1 − ρ and go on from the rest."""
    if arm.ties:
        pair.base = pair.base + (1 - rho) * pair.scale * (pair.b @ pair.a)
    scale_pair(pair, *shrink_factors(pair, rho, balances=arm.balances), pair.scale, arm.moments)


def rescale(pair: Pair, norm: Tensor | None) -> None:
    """Give both factors one norm and keep s·B·A; with `norm` given, s makes up for it."""
    if norm is None:
        scale_pair(pair, *shrink_factors(pair, 1.0), pair.scale, "carried")
        return
    x, y = norms(pair)
    alpha, beta = norm / x, norm / y
    scale_pair(pair, alpha, beta, pair.scale / (alpha * beta), "carried")


def hard_knot(pair: Pair, fresh: Tensor, *, small_start: bool) -> None:
    """Tie all of B·A, go on from the fresh A, B = 0 and a new optimizer."""
    x, y = norms(pair)
    pair.base = pair.weight()
    pair.a = fresh / fresh.norm(dim=-1, keepdim=True) * (x * y).sqrt() if small_start else fresh
    pair.b = torch.zeros_like(pair.b)
    pair.forget()


def adam_step(pair: Pair, grads: tuple[Tensor, Tensor], rate_a: Tensor, rate_b: Tensor) -> None:
    """Take one step of Adam."""
    m_a, v_a, m_b, v_b = pair.moments
    grad_a, grad_b = grads
    pair.count += 1
    m_a, v_a = m_a.lerp(grad_a, 1 - BETA_1), v_a.lerp(grad_a**2, 1 - BETA_2)
    m_b, v_b = m_b.lerp(grad_b, 1 - BETA_1), v_b.lerp(grad_b**2, 1 - BETA_2)
    pair.moments = [m_a, v_a, m_b, v_b]
    first, second = 1 - BETA_1**pair.count, math.sqrt(1 - BETA_2**pair.count)
    pair.a = pair.a - rate_a / first * m_a / (v_a.sqrt() / second + EPSILON)
    pair.b = pair.b - rate_b / first * m_b / (v_b.sqrt() / second + EPSILON)


def gradients(pair: Pair, error: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B; error = W·x − W*·x − noise (…, m, batch)."""
    by = pair.scale / BATCH
    return by * (pair.b.mT @ error) @ inputs.mT, by * error @ (pair.a @ inputs).mT


# --- runs


@dataclass(frozen=True)
class Trace:
    """f / f(0) at `at` steps (points, rates, seeds), and ‖A‖ after each knot."""

    at: tuple[int, ...]
    loss: Tensor
    norms: tuple[Tensor, ...]


def tune(
    problem: Problem, arm: Arm, rates: list[float], value: float | None = None, points: int = 50
) -> Trace:
    """Train with each rate on each seed at once; the rate falls linearly to zero over the run.

    value: what the arm's grid says: τ in steps, or the ratio of rates λ.
    """
    steps, (rows, cols) = len(problem.inputs), problem.target.shape[1:]
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in problem.seeds]
    lead = (len(rates), len(problem.seeds))
    fresh = fresh_a(draws, arm.rank, cols).expand(*lead, arm.rank, cols)
    base = torch.zeros(*lead, rows, cols, dtype=FLOAT)
    scale = torch.full((*lead, 1, 1), SCALE, dtype=FLOAT)
    pair = Pair(base, fresh, torch.zeros(*lead, rows, arm.rank, dtype=FLOAT), scale, [])
    pair.forget()
    follow = tune(problem, ARMS["soft knots"], rates, value).norms if arm.follows_soft_knots else ()
    interval = max(2, round(value)) if arm.kind == "chain" and value else INTERVAL
    rate = torch.tensor(rates, dtype=FLOAT).view(-1, 1, 1, 1)
    ratio = torch.ones(1, dtype=FLOAT) * (value if arm.grid == "lambda" and value else 1.0)
    if arm.balanced_rates:
        ratio = balance_ratio(problem)
    at, losses, seen = [], [], []
    for step in range(steps):
        if step and step % interval == 0 and arm.kind != "none":
            if arm.kind == "chain":
                new = fresh_a(draws, arm.rank, cols).expand(*lead, arm.rank, cols)
                hard_knot(pair, new, small_start=arm.small_start)
            elif arm.kind == "soft":
                soft_knot(pair, math.exp(-INTERVAL / value), arm)
            else:
                rescale(pair, follow[len(seen)] if follow else None)
            seen.append(norms(pair)[0])
        if step % max(1, steps // points) == 0:
            at.append(step)
            losses.append(excess(problem, pair.weight()))
        inputs = problem.inputs[step]
        error = (pair.base - problem.target) @ inputs + pair.scale * (pair.b @ (pair.a @ inputs))
        falling = rate * (1 - step / steps)
        grads = gradients(pair, error - problem.noise[step], inputs)
        adam_step(pair, grads, falling, ratio * falling)
    losses.append(excess(problem, pair.weight()))
    return Trace((*at, steps), torch.stack(losses), tuple(seen))


def balance_ratio(problem: Problem) -> Tensor:
    """Return λ = ‖B‖/‖A‖ of a rank-1 fit of W* with ‖A‖² = 1/3 (seeds, 1, 1)."""
    return 3 * torch.linalg.matrix_norm(problem.target, 2)[:, None, None] / SCALE


def fresh_a(draws: list[torch.Generator], rank: int, cols: int) -> Tensor:
    """Draw A as PEFT does, uniform within ±1/√n: its norm is near 1/√3."""
    return torch.stack(
        [2 * torch.rand(rank, cols, generator=draw, dtype=FLOAT) - 1 for draw in draws]
    ) / math.sqrt(cols)


def excess(problem: Problem, weight: Tensor) -> Tensor:
    """Return f(W) / f(0)."""
    missing = ((weight - problem.target) @ problem.root).square().sum((-2, -1))
    return missing / (problem.target @ problem.root).square().sum((-2, -1))
