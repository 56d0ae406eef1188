"""Why a balanced soft knot gains: folding, balancing and Adam's moments taken apart on a quadratic.

Least squares at rank 1 with a batch of fresh inputs x ~ N(0, C) a step, and noise in the outputs:

    f(W) = ½ tr((W − W*) C (W − W*)ᵀ),    W = W₀ + s·B·A,   A (1 × n), B (m × 1), W₀ = 0 at first

Every `INTERVAL` = 5 steps, with x = ‖A‖, y = ‖B‖ and ρ the share kept, a balanced soft knot does

    t = √(ρ·x·y),  α = t/x,  β = t/y        so α·β = ρ
    W₀ ← W₀ + (1 − ρ)·s·B·A                 tie a share
    A ← α·A,  B ← β·B                       go on from the rest, both factors of one norm
    m_A ← β·m_A,  v_A ← β²·v_A              the gradient of A is proportional to B and the other
    m_B ← α·m_B,  v_B ← α²·v_B              way round: these are the moments of scaled gradients

which leaves W where it was. What is folded leaves the live pair at the rate 1/τ with
τ = −INTERVAL / ln ρ. The classic chain (arXiv 2401.04151) folds all of it every τ steps. ScaLoRA
(arXiv 2510.23818) is a neighbour of the soft knot. Each arm of quadratic.ARMS changes one thing.

Balancing is a choice of step sizes. Adam at rate η on balanced factors moves W as Adam at the rates
√(x/y)·η for A and √(y/x)·η for B on factors of norms x and y, so the arms "at balance's ratio" have
the rate of B over that of A at λ = y/x = σ₁(W*)/(s·‖A‖²), with ‖A‖² = 1/3 as A is drawn, and no
balancing.

The best that rank 1 can do is known (Eckart and Young, weighted by C). What lies below that floor
was gained by rank: no rule for step sizes gets there. On a target of rank 1 only speed can be
gained.

Run: python examples/theory/soft_knots.py [OUTPUT.png] [--small]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from figures import run, save, subplots
from quadratic import ARMS, Arm, floor, make_problem, tune
from torch import Tensor

ROUNDING = 1e-12  # a floor below this is zero


@dataclass(frozen=True)
class Setting:
    """How much is run: what is chosen on `tuning` seeds is reported on `fresh` seeds."""

    steps: int = 500
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-14, -2))
    shares: tuple[float, ...] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # τ over the steps
    ratios: tuple[float, ...] = (1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
    tuning: tuple[int, ...] = tuple(range(4))
    fresh: tuple[int, ...] = tuple(range(100, 110))

    def grid(self, arm: Arm) -> list[float | None]:
        """Return what is tried beside the rate."""
        taus = [share * self.steps for share in self.shares]
        return {"tau": taus, "one tau": taus[-1:], "lambda": list(self.ratios)}.get(
            arm.grid, [None]
        )


SMALL = Setting(
    steps=100,
    rates=(2.0**-10, 2.0**-8, 2.0**-6),
    shares=(1 / 8, 1 / 4),
    ratios=(1 / 16, 1.0),
    tuning=(0, 1),
    fresh=(100, 101),
)
PROBLEMS = {
    "C = I, W* large": {},
    "ill-conditioned C, W* small": {"condition": 1e3, "size": 0.01},
    "the same, W* of rank 1": {"condition": 1e3, "size": 0.01, "rank": 1},
}
MAIN = "ill-conditioned C, W* small"
NOISES = (0.1, 1.0, 10.0, 100.0)  # variance over that of the outputs
SWEPT = ("LoRA", "balancing only", "soft knots", "classic chain", "LoRA, rank 4")


@dataclass(frozen=True)
class Found:
    """What one arm does on one problem.

    table: final loss on the tuning seeds (grid, rates). best: grid value and rate chosen by it.
    loss: of the best on the fresh seeds (points, seeds).
    """

    table: Tensor
    best: tuple[float | None, float]
    interior: bool  # the best rate is at neither end of its grid
    at: tuple[int, ...]
    loss: Tensor


def study(name: str, arm: Arm, setting: Setting) -> Found:
    """Choose the grid value and rate on the tuning seeds and run them on the fresh ones."""
    table = last_losses(arm, setting, **PROBLEMS[name])
    grid, rates = setting.grid(arm), setting.rates
    row, column = divmod(int(table.argmin()), len(rates))
    problem = make_problem(setting.fresh, setting.steps, **PROBLEMS[name])
    trace = tune(problem, arm, [rates[column]], grid[row])
    interior = 0 < column < len(rates) - 1
    return Found(table, (grid[row], rates[column]), interior, trace.at, trace.loss[:, 0])


def last_losses(arm: Arm, setting: Setting, **keywords: float) -> Tensor:
    """Return the mean last loss on the tuning seeds for everything tried (grid, rates)."""
    problem = make_problem(setting.tuning, setting.steps, **keywords)
    rates = list(setting.rates)
    losses = [tune(problem, arm, rates, value, points=1).loss[-1] for value in setting.grid(arm)]
    return torch.stack(losses).mean(2).nan_to_num(torch.inf)


def least(arm: str, setting: Setting, noise: float) -> tuple[float, float | None]:
    """Return the least last loss of an arm on the tuning seeds of the main problem at this noise,
    and the τ in steps that gave it."""
    table = last_losses(ARMS[arm], setting, **PROBLEMS[MAIN], noise=noise)
    row = int(table.argmin()) // len(setting.rates)
    return float(table.min()), setting.grid(ARMS[arm])[row]


def sweeps(setting: Setting) -> tuple[dict, dict]:
    """Return the best of some arms by noise, and by the number of steps at ten times the signal."""
    noises = {noise: {arm: least(arm, setting, noise) for arm in SWEPT} for noise in NOISES}
    lengths = {}
    for share in (1 / 4, 1 / 2, 1, 2):
        shorter = replace(setting, steps=round(share * setting.steps))
        same = shorter.steps == setting.steps
        lengths[shorter.steps] = (
            noises[10.0] if same else {arm: least(arm, shorter, 10.0) for arm in SWEPT}
        )
    return noises, lengths


# --- table and figure


def steps_to(found: Found, level: Tensor) -> int | None:
    """Return the first recorded step at which the mean loss is within 5 % (of f(0)) of `level`."""
    below = found.loss.mean(1) <= level.mean() + 0.05
    return found.at[int(below.int().argmax())] if bool(below.any()) else None


def lines_of(name: str, results: dict[str, Found], setting: Setting) -> list[str]:
    """Return the table of one problem."""
    problem = make_problem(setting.fresh, 1, **PROBLEMS[name])
    level = floor(problem, 1)
    lines = [
        f"{name}: the best of rank 1 leaves {float(level.mean()):.4f}, "
        f"of rank 4 {float(floor(problem, 4).mean()):.4f}",
        f"  {'arm':33} f/f(0) at the end   minus LoRA, paired  lower on  to floor   setting",
    ]
    lora = results["LoRA"].loss[-1]
    for arm, found in results.items():
        last = found.loss[-1]
        ahead = last - lora
        error = float(ahead.std() / math.sqrt(len(last)))
        reached = steps_to(found, level)
        lines.append(
            f"  {arm:33} {float(last.mean()):17.4f}   {float(ahead.mean()):+8.4f} ± {error:.4f}"
            f"   {int((ahead < 0).sum()):2d} of {len(last):<2d}"
            f"  {'–' if reached is None else reached:>8}   {describe(ARMS[arm], found)}"
        )
    return lines


def lines_of_sweep(what: str, found: dict) -> list[str]:
    """Return the table of one sweep."""
    lines = [f"{what:36}" + "".join(f"{each:>17g}" for each in found)]
    for arm in SWEPT:
        shown = [
            f"{loss:.4f}" + (f" (τ {tau:3.0f})" if tau else "        ")
            for loss, tau in (each[arm] for each in found.values())
        ]
        lines.append(f"  {arm:34}" + "".join(f"{each:>17}" for each in shown))
    return lines


def describe(arm: Arm, found: Found) -> str:
    """Return the chosen grid value and rate in words."""
    value, rate = found.best
    beside = {"tau": f", τ = {value or 0:.3g}", "lambda": f", λ = {value or 0:.2g}"}
    end = "" if found.interior else " (end of its grid)"
    return f"rate {rate:.2g}{end}{beside.get(arm.grid, '')}"


NOT_DRAWN = ("LoRA, best ratio of rates", "LoRA turning as soft knots do")  # as balancing only
COLOURS = {
    "LoRA": "#57606a",
    "LoRA, best ratio of rates": "#57606a",
    "LoRA turning as soft knots do": "#8c959f",
    "balancing only": "#9a6700",
    "decay, not tied": "#8250df",
    "folding only": "#1a7f37",
    "soft knots": "#0969da",
    "soft knots, moments unscaled": "#54aeff",
    "soft knots, new moments": "#0a3069",
    "classic chain": "#cf222e",
    "classic chain, small new A": "#ff8182",
    "LoRA at balance's ratio": "#d4a72c",
    "folding only at balance's ratio": "#2da44e",
    "classic chain at balance's ratio": "#bc4c00",
    "LoRA, rank 4": "#24292f",
}


def picture(output: str, results: dict, noises: dict, lengths: dict, setting: Setting) -> None:
    """Draw loss against steps for each problem, then the main problem's grids and sweeps."""
    figure, axes = subplots(2, 4, (17, 8.4), layout="constrained")
    for axis, (name, arms) in zip(axes[0], results.items(), strict=False):
        level = float(floor(make_problem(setting.fresh, 1, **PROBLEMS[name]), 1).mean())
        for arm, found in arms.items():
            if arm not in NOT_DRAWN:
                axis.semilogy(found.at, found.loss.mean(1), **style(arm))
        if level > ROUNDING:
            axis.axhline(level, color="black", linestyle=":", label="best of rank 1")
        axis.set(title=name, xlabel="step", ylabel="f(W) / f(0), fresh seeds")
    taus = [share * setting.steps for share in setting.shares]
    for arm, found in results[MAIN].items():
        if arm not in NOT_DRAWN:
            by_rate = found.table.min(0).values.clamp(max=1)
            axes[1, 0].loglog(setting.rates, by_rate, marker=".", **style(arm))
        if ARMS[arm].grid == "tau":
            axes[1, 1].loglog(taus, found.table.min(1).values, marker=".", **style(arm))
    axes[1, 0].set(title="W* small: each rate at its best τ", xlabel="learning rate (of A)")
    axes[1, 1].set(title="W* small: each τ at its best rate", xlabel="τ, or steps a link")
    for axis, found in ((axes[1, 2], noises), (axes[1, 3], lengths)):
        for arm in SWEPT:
            losses = [each[arm][0] for each in found.values()]
            axis.loglog(list(found), losses, marker=".", **style(arm))
    axes[1, 2].set(title="W* small: by noise", xlabel="variance of noise over signal")
    axes[1, 3].set(title="W* small, noise 10: by length of the run", xlabel="steps")
    axes[1, 3].set_xticks(list(lengths), [str(steps) for steps in lengths])
    axes[1, 3].minorticks_off()
    for axis in axes[1]:
        axis.set_ylabel("f(W) / f(0) at the end, tuning seeds")
    axes[0, 3].axis("off")
    axes[0, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=11)
    save(figure, output, dots_per_inch=90)


def style(arm: str) -> dict:
    """Return how an arm is drawn: dashed where nothing is folded into the weights."""
    folds = ARMS[arm].kind in ("soft", "chain") and ARMS[arm].ties
    return {
        "color": COLOURS[arm],
        "linestyle": "-." if ARMS[arm].balanced_rates else "-" if folds else "--",
        "linewidth": 2.2 if arm == "soft knots" else 1.3,
        "label": arm,
    }


def main(output: str, *, small: bool) -> None:
    """Run every arm on every problem, print the tables and draw the figure."""
    setting = SMALL if small else Setting()
    results = {}
    for name in PROBLEMS:
        results[name] = {arm: study(name, rules, setting) for arm, rules in ARMS.items()}
        print("\n".join(lines_of(name, results[name], setting)), flush=True)
    noises, lengths = sweeps(setting)
    print("\n".join(lines_of_sweep(f"{MAIN}, by noise:", noises)))
    print("\n".join(lines_of_sweep("the same at noise 10, by steps:", lengths)))
    picture(output, results, noises, lengths, setting)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main, __doc__, "soft_knots.png")
