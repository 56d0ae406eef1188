"""The charts of a report: each drawn for a task on the page, and for all tasks into a file.

A chart is an entry of `CHARTS`; benchmarks/paper adds some of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from chainlora.evaluation.metrics import is_higher_better
from chainlora_lab.report.comparisons import Facts
from chainlora_lab.report.values import (
    Curve,
    Summary,
    by_seed,
    difference_curves,
    digits,
    loss_curves,
)
from chainlora_lab.results import Results
from chainlora_lab.statistics.pairs import VERDICTS
from chainlora_pages import (
    Picture,
    Table,
    legend_above,
    line_style,
    number,
    picture,
    save,
    whole_steps,
)

Curves = Callable[[Results, str], list[Curve]]
PAGE_SIZE, SMALL = (4.0, 2.9), 9  # of a chart: inches, and points of its smallest text
BLUE, GREY, INK = "#0072B2", "#777777", "#222222"  # which have their own value on a dark page
_COLOURS = dict(zip(VERDICTS, ("#1A7F37", "#CF222E", "#57606A", GREY), strict=True))


@dataclass(frozen=True)
class Chart:
    """A chart: its file, the figure that asks for it, its section and title, and how it is drawn.

    `draw` draws what the facts say of a task into axes; `tasks` are those it has something of;
    `height` is that of a panel in inches; a file has at most `columns` panels side by side.
    """

    name: str
    figure: str
    section: str
    title: str
    draw: Callable[[Any, Facts, str], object]
    tasks: Callable[[Facts], Sequence[str]]
    table: Callable[[Facts, str], Table | None] = lambda facts, task: None
    note: str = ""
    height: Callable[[Facts, str], float] = lambda facts, task: PAGE_SIZE[1]
    columns: int = 4


def asked_for(facts: Facts, charts: Iterable[Chart]) -> list[Chart]:
    """Return the charts of the figures that an experiment asks for, with something to draw."""
    figures = facts.results.experiment["figures"]
    return [chart for chart in charts if chart.figure in figures and chart.tasks(facts)]


def pictures(facts: Facts, charts: Iterable[Chart], section: str) -> list[Picture]:
    """Return the charts of a section of the page, one a task."""
    return [
        _picture(facts, chart, task)
        for chart in charts
        if chart.section == section
        for task in chart.tasks(facts)
    ]


def _picture(facts: Facts, chart: Chart, task: str) -> Picture:
    def draw(axes: Any) -> None:
        chart.draw(axes, facts, task)
        if handles := _named(axes):
            legend_above(axes, handles=handles)

    size = (PAGE_SIZE[0], chart.height(facts, task))
    table = chart.table(facts, task)
    return picture(f"{chart.title}: {task}", chart.note, draw, size=size, table=table)


def save_charts(facts: Facts, charts: Iterable[Chart], out: Path) -> dict[str, str]:
    """Draw each chart as PNG and SVG into `out`; return the PNG files and their sections."""
    written = {}
    for chart in charts:
        tasks = chart.tasks(facts)
        columns = min(chart.columns, len(tasks))
        rows = [tasks[start : start + columns] for start in range(0, len(tasks), columns)]
        heights = [max(chart.height(facts, task) for task in row) for row in rows]
        fill = partial(_fill, facts=facts, chart=chart, rows=rows, heights=heights)
        width = (PAGE_SIZE[0] if columns > 1 else 1.6 * PAGE_SIZE[0]) * columns
        for suffix in ("png", "svg"):
            save(fill, (width, sum(heights) + 0.5), out / f"{chart.name}.{suffix}")
        written[f"{chart.name}.png"] = chart.section
    return written


def _fill(
    figure: Any, facts: Facts, chart: Chart, rows: Sequence[Sequence[str]], heights: list[float]
) -> None:
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    spare = list(panels.flat)
    for task in chain.from_iterable(rows):
        axes = spare.pop(0)
        chart.draw(axes, facts, task)
        axes.set_title(task)
    for axes in spare:
        axes.remove()
    if handles := _named(*panels.flat):
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _named(*panels: Any) -> list[Any]:
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values())


# --- scores ---


def draw_scores(axes: Any, facts: Facts, task: str) -> None:
    """Draw the score of every method on a task: dots for seeds, a bar for the mean."""
    own = of_task(facts, task)
    for place, summary in enumerate(own):
        values = list(by_seed(facts.results, task, summary.method).values())
        dots = {"color": BLUE, "alpha": 0.4, "marker": "o", "markersize": 4, "linestyle": ""}
        axes.plot([place] * len(values), values, label="a seed", **dots)
        bar = {"marker": "_", "color": BLUE, "markersize": 16, "markeredgewidth": 2}
        axes.plot([place], [summary.mean], label="mean", linestyle="", **bar)
    name_places(axes, [summary.method for summary in own])
    name_metric(axes, own[0])


def name_places(axes: Any, names: Sequence[str]) -> None:
    """Name the places along the axis below."""
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")


def name_metric(axes: Any, summary: Summary) -> None:
    """Name the axis at the side, and draw what the commonest answer would score."""
    axes.set_ylabel(summary.metric + (" (%)" if is_higher_better(summary.metric) else ""))
    if summary.majority is not None:
        line = {"color": "#000000", "linestyle": ":", "linewidth": 0.8}
        axes.axhline(summary.majority, label="commonest answer", **line)
    axes.grid(axis="x", visible=False)


def of_task(facts: Facts, task: str) -> list[Summary]:
    return [summary for summary in facts.summaries if summary.task == task]


def _seeds_table(facts: Facts, task: str) -> Table:
    rows = []
    for summary in of_task(facts, task):
        places = digits(summary.metric)
        values = by_seed(facts.results, task, summary.method).values()
        shown = ", ".join(number(value, places) for value in values)
        rows.append((summary.method, shown, number(summary.mean, places)))
    return Table(f"Scores: {task}", ("method", "seeds", "mean"), tuple(rows))


# --- differences ---


def draw_differences(axes: Any, facts: Facts, task: str) -> None:
    """Draw the paired differences on a task with their intervals, verdicts in words."""
    own = [each for each in facts.comparisons if each.task == task]
    for row, comparison in enumerate(reversed(own)):
        d = comparison.difference
        colour = _COLOURS[d.verdict]
        fill = "#FFFFFF" if d.verdict == "too few pairs" else colour
        mark = {"marker": "s", "markersize": 6, "markerfacecolor": fill, "zorder": 3}
        axes.plot([d.mean], [row], color=colour, linestyle="", **mark)
        if math.isfinite(d.low):
            axes.plot([d.low, d.high], [row, row], color=colour)
        pair = f"{comparison.method} − {comparison.rival} (n={d.num_pairs})"
        for height, text, ink in ((0.24, pair, INK), (-0.24, d.verdict, colour)):
            place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": SMALL}
            axes.text(0.01, row + height, text, color=ink, **place)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_ylim(-0.5, len(own) - 0.5)
    unit = "points" if is_higher_better(own[0].metric) else own[0].metric
    axes.set_xlabel(f"{own[0].value}, difference in {unit}\n{own[0].better}; 95 % intervals")


# --- curves ---


def _curve_chart(name: str, title: str, note: str, curves: Curves, label: str) -> Chart:
    """Return a chart of mean curves over seeds: 95 % bands where seeds allow one, a tick at each
    knot."""

    def draw(axes: Any, facts: Facts, task: str) -> None:
        methods = list(facts.results.experiment["methods"])
        for curve in curves(facts.results, task):
            style, steps = line_style(methods.index(curve.method)), list(curve.points)
            means, lows, highs = zip(*curve.points.values(), strict=True)
            hidden = curve.name.startswith("_")  # as matplotlib hides such a label
            said = " " * hidden + f"{curve.name} (n={curve.num_seeds})"
            axes.plot(steps, means, linewidth=1.4, label=said, **style)
            if all(map(math.isfinite, lows)):
                band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(steps, lows, highs, **band)
            at = [step for step in curve.knots if step in curve.points]
            heights = [curve.points[step][0] for step in at]
            axes.plot(at, heights, "|", color=style["color"], markersize=9)
        if curves is difference_curves:
            axes.axhline(0, color="#000000", linewidth=0.8)
        whole_steps(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(label)

    return Chart(
        name=name,
        figure="curves",
        section="Loss against steps",
        title=title,
        note=note,
        draw=draw,
        tasks=lambda facts: [task for task in facts.tasks if curves(facts.results, task)],
        table=lambda facts, task: _curve_table(curves(facts.results, task)),
    )


def _curve_table(curves: Sequence[Curve]) -> Table:
    def cell(curve: Curve, step: int) -> str:
        point = curve.points.get(step, (math.nan, math.nan, math.nan))
        mean, low, high = (number(value, 4) for value in point)
        return f"{mean} ({low} to {high})" if math.isfinite(point[1]) else mean

    steps = sorted({step for curve in curves for step in curve.points})
    rows = tuple((str(step), *(cell(curve, step) for curve in curves)) for step in steps)
    heads = ("step", *(f"{curve.name} (n={curve.num_seeds})" for curve in curves))
    return Table("Means, with 95 % intervals where seeds allow one", heads, rows)


# The figures that an experiment can ask for.
CHARTS = (
    Chart(
        name="differences",
        figure="differences",
        section="Verdict",
        title="Paired differences",
        draw=draw_differences,
        tasks=lambda facts: list(dict.fromkeys(each.task for each in facts.comparisons)),
        height=lambda facts, task: 0.9 + 0.55 * sum(c.task == task for c in facts.comparisons),
        columns=1,
    ),
    Chart(
        name="scores",
        figure="scores",
        section="Scores",
        title="Scores",
        draw=draw_scores,
        tasks=lambda facts: facts.tasks,
        table=_seeds_table,
    ),
    _curve_chart(
        "curves",
        "Validation loss",
        "mean over seeds; ticks are knots, bands 95 % intervals where seeds allow one",
        loss_curves,
        "validation loss",
    ),
    _curve_chart(
        "curve_differences",
        "Loss less the rival's",
        "paired by seed; below 0 is better",
        difference_curves,
        "difference in loss",
    ),
)
