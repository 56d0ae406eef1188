"""Curves of held-out loss against steps: the arms, and their paired differences to LoRA."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from chainlora_lab.statistics.intervals import t_interval

Curves = dict[int, list[list[float]]]  # by seed: [step, loss]


def draw_curves(
    title: str, arms: dict[str, Curves], lines: dict[str, float], reference: str, path: Path
) -> None:
    """Draw mean losses, and differences to `reference` with 95 % bands, side by side."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colors = pyplot.get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
    for color, (name, curves) in zip(colors, arms.items(), strict=False):
        steps, losses = _means(curves)
        left.plot(steps, losses, color=color, marker="o", markersize=3, label=name)
        if name != reference:
            _draw_difference(right, name, curves, arms[reference], color)
    for name, loss in lines.items():
        left.axhline(loss, color="grey", linewidth=0.8, linestyle=":")
        left.text(0.01, loss, name, transform=left.get_yaxis_transform(), fontsize=8, va="bottom")
    right.axhline(0, color=colors[0], linewidth=1.2)
    before = next(iter(arms[reference].values()))[0][1]
    left.set(
        title=f"{title} (zero-shot {before:.2f})",
        xlabel="step",
        ylabel="held-out loss (nats a token)",
    )
    right.set(
        title=f"less {reference}, paired by seed, 95 % t band",
        xlabel="step",
        ylabel="difference (nats a token)",
    )
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_difference(axes, name: str, curves: Curves, reference: Curves, color) -> None:
    seeds = sorted(set(curves) & set(reference))
    if len(seeds) < 4:
        return
    steps = [step for step, _ in curves[seeds[0]][1:]]
    values = [
        [curves[seed][place][1] - reference[seed][place][1] for seed in seeds]
        for place in range(1, len(steps) + 1)
    ]
    bands = [t_interval(at) for at in values]
    means = [statistics.fmean(at) for at in values]
    axes.plot(steps, means, color=color, marker="o", markersize=3, label=f"{name} (n={len(seeds)})")
    axes.fill_between(steps, *zip(*bands, strict=True), color=color, alpha=0.15, linewidth=0)


def _means(curves: Curves) -> tuple[list[float], list[float]]:
    """Return steps and mean losses, without the point before training."""
    points = list(zip(*[curve[1:] for curve in curves.values()], strict=True))
    return [at[0][0] for at in points], [statistics.fmean(p[1] for p in at) for at in points]
