"""The figure of losses against steps: a column a task, curves above, paired differences below."""

from __future__ import annotations

import math
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt

from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.curves import (
    Curve,
    difference_curves,
    loss_curves,
    untrained_loss,
)

_WIDTH, _HEIGHT = 5.0, 3.4  # inches of a panel
_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def curves(results: Results) -> Any:
    """Return the figure of validation loss against steps; None where no run kept a curve."""
    tasks = [task for task in results.experiment["tasks"] if loss_curves(results, task)]
    if not tasks:
        return None
    figure, axes = plt.subplots(
        2,
        len(tasks),
        figsize=(_WIDTH * len(tasks), 2 * _HEIGHT),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for column, task in enumerate(tasks):
        draw_losses(axes[0][column], results, task)
        draw_differences(axes[1][column], results, task)
    return figure


def _method_colours(results: Results) -> dict[str, Any]:
    return {
        method: _COLOURS[place % len(_COLOURS)]
        for place, method in enumerate(results.experiment["methods"])
    }


def draw_losses(axis: Any, results: Results, task: str) -> None:
    """Draw the validation loss of each method on a task against steps."""
    colours = _method_colours(results)
    for curve in loss_curves(results, task):
        _draw(axis, curve, colours[curve.name])
    untrained = untrained_loss(results, task)
    if untrained is not None:
        axis.axhline(untrained, color="black", linestyle=":", linewidth=0.8, label="untrained")
    axis.set_title(task, fontsize=10)
    axis.set_ylabel("validation loss", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)


def draw_differences(axis: Any, results: Results, task: str) -> None:
    """Draw the paired differences on a task against steps: lower is better."""
    colours = _method_colours(results)
    for curve in difference_curves(results, task):
        _draw(axis, curve, colours[curve.name.partition(" − ")[0]])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("steps", fontsize=8)
    axis.set_ylabel("loss less the rival's (lower is better)", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _draw(axis: Any, curve: Curve, colour: Any) -> None:
    """Draw the mean, its 95 % interval as a band where seeds allow one, and a tick at each knot."""
    label = f"{curve.name} (n={curve.num_seeds})"
    axis.plot(curve.steps, curve.means, color=colour, linewidth=1.4, label=label)
    if all(map(math.isfinite, curve.lows)):
        axis.fill_between(curve.steps, curve.lows, curve.highs, color=colour, alpha=0.15, lw=0)
        for end, values in (("from", curve.lows), ("to", curve.highs)):
            name = f"{curve.name}, 95 % {end}"
            axis.plot(curve.steps, values, color=colour, alpha=0.3, lw=0.5, label="_", gid=name)
    by_step = dict(zip(curve.steps, curve.means, strict=True))
    at = [step for step in curve.knots if step in by_step]
    ends = [by_step[step] for step in at]
    axis.plot(at, ends, "|", color=colour, markersize=9, gid=f"{label}, knot")
