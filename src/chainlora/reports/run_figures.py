"""The figures of a run's report, drawn by the same panels as its PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from chainlora.reports.figures import Picture, draw
from chainlora.reports.runs import Record, RunFacts
from chainlora.runs.panels import (
    COLOURS,
    STYLE,
    draw_loss,
    draw_norms,
    draw_overlap,
    draw_ranks,
    draw_rate,
    draw_received,
    draw_scores,
    draw_spectra,
    mark_knots,
    score_names,
    smooth,
)

_MOST_POINTS = 400  # of a curve; a page is as wide as about a thousand pixels
_Fill = Callable[[Any, Any], None]


def training_pictures(run: RunFacts) -> list[Picture]:
    """Return loss, validation scores and learning rate over the steps, knots marked."""
    steps, evals = run.steps, run.evaluations
    drawn, width = thinned(steps)
    each = "each step" if width == 1 else f"mean of {width} steps"
    found = []
    if steps or evals:
        fill = _over_steps(run, lambda axes: draw_loss(axes, drawn, evals, each=each))
        note = "in nats; the vertical lines are knots"
        found.append(_picture("Loss over the steps", note, fill))
    if names := score_names(evals):
        fill = _over_steps(run, lambda axes: draw_scores(axes, evals, names))
        found.append(_picture("Validation scores over the steps", "", fill))
    if steps:
        fill = _over_steps(run, lambda axes: draw_rate(axes, drawn))
        found.append(_picture("Learning rate over the steps", "", fill))
    return found


def chain_pictures(run: RunFacts) -> list[Picture]:
    """Return what each link became: size, rank, spectrum, where it went, overlap."""
    links = run.links
    if not links:
        return []
    found = [_picture("Rank of each link", "how many directions it uses", _axes(draw_ranks, links))]
    if all("modules" in link for link in links):
        note = "Frobenius norm of its update, over all modules"
        found.insert(0, _picture("Size of each link", note, _axes(draw_norms, links)))
        note = "mean over the modules, the largest first"
        found.append(_picture("Singular spectrum of each link", note, _axes(draw_spectra, links)))
        found += _received(links)
    if len(links) > 1 and any(link.get("overlap") for link in links):
        note = "1: they read the same subspace of their inputs; 0: orthogonal ones"
        fill = _with_figure(draw_overlap, links)
        found.append(_picture("Overlap of the links", note, fill))
    return found


def comparing_pictures(runs: Sequence[RunFacts]) -> list[Picture]:
    """Return the curves of several runs in one figure each: validation, and training loss."""
    found = []
    score = common_score(runs)
    for name in dict.fromkeys(filter(None, ("loss", score))):
        if any(_held_out(run, name) for run in runs):
            title = f"Validation {name} of each run"
            found.append(_picture(title, "large dots are knots", _overlaid(runs, name)))
    if any(run.steps for run in runs):
        fill = _overlaid(runs, None)
        found.append(_picture("Training loss of each run", "smoothed; dots are knots", fill))
    return found


def common_score(runs: Sequence[RunFacts]) -> str | None:
    """Return the metric that all runs with validations are judged by, if it is one."""
    names = {run.score for run in runs if run.score}
    return names.pop() if len(names) == 1 else None


def thinned(steps: Sequence[Record]) -> tuple[list[Record], int]:
    """Return at most about `_MOST_POINTS` means over steps of a link, and over how many each."""
    width = max(1, -(-len(steps) // _MOST_POINTS))
    if width == 1:
        return list(steps), 1
    found: list[Record] = []
    for _, own in groupby(steps, key=lambda record: record["link"]):
        of_link = list(own)
        for start in range(0, len(of_link), width):
            part = of_link[start : start + width]
            mean = sum(record["loss"] for record in part) / len(part)
            found.append({**part[-1], "loss": mean})
    return found, width


def _picture(title: str, note: str, fill: Callable[[Any], None]) -> Picture:
    return draw(title, note, fill, style=STYLE)


def _over_steps(run: RunFacts, panel: Callable[[Any], None]) -> Callable[[Any], None]:
    def fill(figure: Any) -> None:
        axes = figure.subplots()
        panel(axes)
        mark_knots([axes], run.records)
        axes.set_xlabel("step")

    return fill


def _axes(panel: _Fill, links: Sequence[Record]) -> Callable[[Any], None]:
    return lambda figure: panel(figure.subplots(), links)


def _with_figure(panel: Callable[[Any, Any, Any], None], links: Any) -> Callable[[Any], None]:
    return lambda figure: panel(figure, figure.subplots(), links)


# --- what each part of the model received ---


def _received(links: Sequence[Record]) -> list[Picture]:
    names = list(dict.fromkeys(name for link in links for name in link["modules"]))
    found = []
    for title, axis, part_of in (
        ("What each layer received", "layer", layer_of),
        ("What each kind of module received", "", kind_of),
    ):
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(part_of(name), []).append(name)
        if len(parts) > 1:
            ordered = dict(sorted(parts.items(), key=_numbers_first)) if axis else parts
            fill = _heat_map(links, ordered, axis)
            found.append(_picture(title, "Frobenius norm of the update by each link", fill))
    return found


def layer_of(module: str) -> str:
    """Return the number of the layer that a module is in; its last name where it is in none."""
    numbers = [part for part in module.split(".") if part.isdecimal()]
    return numbers[0] if numbers else kind_of(module)


def kind_of(module: str) -> str:
    """Return the name that a module has in every layer."""
    return [part for part in module.split(".") if not part.isdecimal()][-1]


def _numbers_first(item: tuple[str, list[str]]) -> tuple[bool, int, str]:
    name = item[0]
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def _heat_map(
    links: Sequence[Record], parts: Mapping[str, Sequence[str]], axis: str
) -> Callable[[Any], None]:
    def fill(figure: Any) -> None:
        axes = figure.subplots()
        draw_received(figure, axes, links, parts)
        axes.set_xlabel(axis)
        if not axis:
            axes.tick_params(axis="x", rotation=30)

    return fill


# --- several runs ---


def _held_out(run: RunFacts, name: str) -> list[Record]:
    return [r for r in run.evaluations if math.isfinite(r.get(name, math.nan))]


def _overlaid(runs: Sequence[RunFacts], name: str | None) -> Callable[[Any], None]:
    """Return what draws a validation metric of each run, or its smoothed training loss."""

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        for place, run in enumerate(runs):
            records = thinned(run.steps)[0] if name is None else _held_out(run, name)
            values = [record[name or "loss"] for record in records]
            if name is None:
                values = smooth(values, span=max(9, len(values) / 12))
            knots = {record["step"] for record in run.records if record["event"] == "knot"}
            at = [record["step"] for record in records]
            axes.plot(
                at,
                values,
                color=COLOURS[place % len(COLOURS)],
                linestyle=("-", "--", ":")[place // len(COLOURS) % 3],
                marker="o",
                markevery=[i for i, step in enumerate(at) if step in knots],
                linewidth=1.6,
                label=run.name,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(f"validation {name}" if name else "training loss")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False)

    return fill
