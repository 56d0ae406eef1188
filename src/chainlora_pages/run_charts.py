"""Charts of training: losses, scores and rates over the steps, for PNG files and for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from chainlora.runs.records import Record, of_event, score_names
from chainlora_pages.charts import (
    GREY,
    MOST_LABELS,
    SMALL,
    TRAINING,
    VALIDATION,
    Draw,
    Panel,
    Picture,
    legend_above,
    picture,
    save,
    stage_style,
    whole_steps,
)
from chainlora_pages.runs import RunFacts

LOSS = "Loss over the steps"
RATE = "Learning rate over the steps"
_MOST_POINTS = 400  # of a curve; a page is about a thousand pixels wide


# --- files ---


def plot_training(records: Sequence[Record], out_png: str | Path) -> None:
    """Draw loss, validation scores and learning rate over the steps, with knots as dashed lines."""
    panels = _training(records)
    heights = [panel.height for panel in panels]

    def fill(figure: Any) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for panel, axes in zip(panels, grid.flat, strict=True):
            panel.draw(axes)
        _mark_knots(list(grid.flat), records)
        figure.align_ylabels(list(grid.flat))

    save(fill, (8, 0.9 + 1.15 * sum(heights)), out_png)


# --- pages ---


def training_pictures(records: Sequence[Record]) -> list[Picture]:
    """Return charts of loss, validation scores and learning rate, with knots marked."""

    def marked(draw: Draw, axes: Any) -> None:
        draw(axes)
        _mark_knots([axes], records)

    return [picture(p.title, p.note, partial(marked, p.draw)) for p in _training(records)]


def comparing_pictures(runs: Sequence[RunFacts]) -> list[Picture]:
    """Return charts that compare several runs: validation metrics, and training loss."""
    pictures = []
    scores = {run.score for run in runs if run.score}
    names = [*scores, "loss"] if len(scores) == 1 else ["loss"]
    for name in dict.fromkeys(names):
        if any(_with_metric(run.evaluations, name) for run in runs):
            draw = partial(_draw_runs, runs=runs, name=name)
            title = f"Validation {name} of each run"
            pictures.append(picture(title, "large dots are knots", draw))
    if any(run.steps for run in runs):
        draw = partial(_draw_runs, runs=runs, name=None)
        pictures.append(picture("Training loss of each run", "smoothed; dots are knots", draw))
    return pictures


def _draw_runs(axes: Any, runs: Sequence[RunFacts], name: str | None) -> None:
    """Draw a validation metric of each run, or its smoothed training loss."""
    for place, run in enumerate(runs):
        records = _with_metric(run.evaluations, name) if name else thinned(run.steps)[0]
        if not records:
            continue
        values = [record[name or "loss"] for record in records]
        if name is None:
            values = smooth(values, span=max(9, len(values) / 12))
        knots = {record["step"] for record in of_event(run.records, "knot")}
        at = [record["step"] for record in records]
        marked = [i for i, step in enumerate(at) if step in knots]
        style = stage_style(place) | {"marker": "o", "markevery": marked, "linewidth": 1.6}
        axes.plot(at, values, label=run.name, **style)
    whole_steps(axes.xaxis)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {name}" if name else "training loss")
    legend_above(axes)


def _with_metric(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if math.isfinite(record.get(name, math.nan))]


def thinned(steps: Sequence[Record]) -> tuple[list[Record], int]:
    """Average the loss over groups of steps of a link. Return the means and the group size.

    There are at most about `_MOST_POINTS` means.
    """
    width = max(1, -(-len(steps) // _MOST_POINTS))
    if width == 1:
        return list(steps), 1
    means: list[Record] = []
    for _, records in groupby(steps, key=lambda record: record["link"]):
        link_steps = list(records)
        for start in range(0, len(link_steps), width):
            part = link_steps[start : start + width]
            mean = sum(record["loss"] for record in part) / len(part)
            means.append({**part[-1], "loss": mean})
    return means, width


# --- training ---


def _training(records: Sequence[Record]) -> list[Panel]:
    steps, evals = of_event(records, "step"), of_event(records, "eval")
    means, width = thinned(steps)
    label = "each step" if width == 1 else f"mean of {width} steps"
    panels = []
    if names := score_names(evals):  # scores come before the loss
        draw = partial(_draw_scores, evals=evals, names=names)
        panels.append(Panel("Validation scores over the steps", "", draw, 2.0))
    if steps or _with_metric(evals, "loss"):
        draw = partial(_draw_loss, steps=means, evals=evals, label=label)
        note = "in nats; vertical lines are knots"
        panels.append(Panel(LOSS, note, draw, 3.0))
    if steps:
        draw = partial(_draw_rate, steps=means)
        panels.append(Panel(RATE, "", draw))
    return panels


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` steps, unbiased at the start."""
    decay = 1 - 2 / (max(span, 1) + 1)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def _draw_loss(axes: Any, steps: Sequence[Record], evals: Sequence[Record], label: str) -> None:
    finite, held_out = _with_metric(steps, "loss"), _with_metric(evals, "loss")
    losses = [r["loss"] for r in finite]
    if finite:
        at, smoothed = [r["step"] for r in finite], smooth(losses, span=max(9, len(losses) / 12))
        axes.plot(at, losses, color=TRAINING, alpha=0.35, linewidth=0.8, label=label)
        axes.plot(at, smoothed, color=TRAINING, linewidth=1.8, label="smoothed")
    if held_out:
        at, values = [r["step"] for r in held_out], [r["loss"] for r in held_out]
        style = {"color": VALIDATION, "linewidth": 1.2, "marker": "o", "markersize": 5}
        axes.plot(at, values, label="validation", **style)
    axes.set_ylabel("loss")
    narrow = {"handlelength": 1.2, "columnspacing": 0.8, "handletextpad": 0.4}
    for handle in axes.legend(loc="upper right", ncols=3, **narrow).get_lines():
        handle.set_linewidth(1.8)
    # Cut off single spikes (the highest half per cent), and leave space above for the legend.
    ordered = sorted(losses[len(losses) // 50 :])
    shown = [*ordered[: int(len(ordered) * 0.995) + 1], *(r["loss"] for r in held_out)]
    if shown:
        top, low = max(shown), min(shown)
        room = (top - low) or abs(top) or 1.0
        axes.set_ylim(low - 0.06 * room, top + 0.25 * room)


def _draw_scores(axes: Any, evals: Sequence[Record], names: Sequence[str]) -> None:
    from matplotlib.ticker import PercentFormatter

    everything = []
    for name, dashes, marker in zip(names, ("-", "--", ":"), "osD", strict=False):
        points = [(r["step"], r[name]) for r in _with_metric(evals, name)]
        everything += [value for _, value in points]
        style: dict[str, Any] = {"color": VALIDATION, "linestyle": dashes, "marker": marker}
        style |= {"markersize": 5, "linewidth": 1.5}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    fractions = "margin" not in names and all(0 <= value <= 1 for value in everything)
    if fractions:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(names) == 1:
        _label_points(axes, evals, names[0], "{:.1%}" if fractions else "{:.3g}")
        axes.set_ylabel(f"validation\n{names[0]}")
    else:
        axes.set_ylabel("validation")
        axes.legend(loc="best")
    axes.margins(y=0.25)
    if fractions:  # space for the labels, but no tick far below 0 % or above 100 %
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.09), min(high, 1.09))


def _label_points(axes: Any, evals: Sequence[Record], name: str, form: str) -> None:
    marked = [r for r in evals if name in r and r.get("where") in ("start", "knot", "end")]
    for r in {r["step"]: r for r in marked[-MOST_LABELS:]}.values():
        axes.annotate(
            form.format(r[name]),
            (r["step"], r[name]),
            (0, 8),
            textcoords="offset points",
            ha="center" if r["step"] else "left",  # not over the axis
            fontsize=SMALL,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )


def _draw_rate(axes: Any, steps: Sequence[Record]) -> None:
    for link, records in groupby(steps, key=lambda record: record["link"]):  # a gap at a restart
        points = [(r["step"], r.get("learning_rate", math.nan)) for r in records]
        axes.plot(*zip(*points, strict=True), color=TRAINING, linewidth=1.5, label=f"link {link}")
    axes.set_ylabel("learning\nrate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_ylim(bottom=0)


def _mark_knots(panels: Sequence[Any], records: Sequence[Record]) -> None:
    """Draw a dashed line at each knot, and label each link above its steps."""
    knots = [r["step"] for r in of_event(records, "knot")]
    last = max(r["step"] for r in records if "step" in r)
    for axes in panels:
        whole_steps(axes.xaxis)
        axes.set_xlabel("step" if axes is panels[-1] else "")
        for step in knots:
            axes.axvline(step, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="_knot")
        axes.set_xlim(-0.04 * max(last, 1), 1.04 * max(last, 1))
    edges = [0, *knots, *([last] if not knots or last > knots[-1] else [])]
    if len(edges) - 1 > MOST_LABELS:
        return
    first = min((r["link"] for r in records if "link" in r), default=0)  # not 0 in later stages
    for link, (start, end) in enumerate(pairwise(edges), first):
        panels[0].annotate(
            f"link {link}" if len(edges) < 7 else f"{link}",
            ((start + end) / 2, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color="#444444",
        )
