"""The report of an experiment as a page: the verdict in one sentence, then figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from chainlora.experiments.execution.results import Results
from chainlora.experiments.report import figures
from chainlora.experiments.report.comparisons import Comparison
from chainlora.experiments.report.curve_figures import draw_differences, draw_losses
from chainlora.experiments.report.curves import difference_curves, loss_curves
from chainlora.experiments.report.labels import title
from chainlora.experiments.report.machines import provenance
from chainlora.experiments.report.report_tables import differences_table
from chainlora.experiments.report.sections import headline, introduction, methods, verdicts
from chainlora.experiments.report.summaries import Summary
from chainlora.reports.figures import Picture, draw, page_style, picture
from chainlora.reports.page import Block, Column, Numbers, Page, Section, Text
from chainlora.reports.tables import Table

_Panel = Callable[[Any, Results, str], None]

_WIDTH = 4.4  # inches of a forest plot: a phone can show it
_OF_SCORES: Mapping[str, tuple[str, Callable[[Results, Sequence[Summary]], Any]]] = {
    "scores": ("Scores", figures.scores),
    "chain_length": ("Score by the number of links", figures.chain_length),
    "rank_step_down": ("Score by the ranks of the links", figures.rank_step_down),
}


def experiment_page(
    results: Results,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    tables: Mapping[str, Table],
) -> Page:
    """Return the page of an experiment's report, with the figures that the experiment asks for."""

    def section(name: str, blocks: Sequence[Block], *named: str) -> Section:
        found = [Numbers(tables[each]) for each in named if each in tables]
        return Section(name, [Column("", [*blocks, *found])])

    text = introduction(results).partition("\n")[2]
    return Page(
        title(results),
        headline(comparisons),
        [
            section("Question", [Text(text)]),
            section(
                "Verdict",
                [*_said(verdicts(comparisons)), *_differences(results, comparisons)],
                *("differences", "losses", "machines"),
            ),
            section("Scores", _scores(results, summaries), "scores", "others", "gap"),
            section("Loss against steps", _curves(results)),
            section("Cost", [], "costs", "savings"),
            section("Hyper-parameters", [], "choices"),
            section("Methods", _said(methods(results))),
            section("Where this comes from", _said(provenance(results))),
        ],
    )


def _said(markdown: str) -> list[Block]:
    """Return a section of the Markdown report without its heading."""
    text = markdown.partition("\n")[2].strip()
    return [Text(text)] if text else []


def _differences(results: Results, comparisons: Sequence[Comparison]) -> list[Block]:
    if "differences" not in results.experiment["figures"]:
        return []
    found: list[Block] = []
    for task in dict.fromkeys(comparison.task for comparison in comparisons):
        own = [comparison for comparison in comparisons if comparison.task == task]
        table = differences_table(own, "score", explained=False)
        name = f"Paired differences: {task}"
        make = partial(figures.differences, own, width=_WIDTH)
        named = Table(name, table.heads, table.rows)
        found.append(_drawn(name, f"95 % intervals; {own[0].better} is better", make, named))
    return found


def _scores(results: Results, summaries: Sequence[Summary]) -> list[Block]:
    found: list[Block] = []
    for name in results.experiment["figures"]:
        what, make = _OF_SCORES.get(name, ("", None))
        for task in dict.fromkeys(summary.task for summary in summaries):
            own = [summary for summary in summaries if summary.task == task]
            if make is not None and (name != "chain_length" or any(s.ranks for s in own)):
                found.append(_drawn(f"{what}: {task}", "", partial(make, results, own)))
    return found


def _drawn(name: str, note: str, make: Callable[[], Any], table: Table | None = None) -> Picture:
    """Return a figure that pyplot draws, as a picture."""
    import matplotlib.pyplot as plt

    with page_style():
        figure = make()
    try:
        return picture(name, note, figure, table=table)
    finally:
        plt.close(figure)


def _curves(results: Results) -> list[Block]:
    if "curves" not in results.experiment["figures"]:
        return []
    losses = "mean over seeds; ticks are knots"
    differences = "paired by seed; lower is better"
    found: list[Block] = []
    for task in results.experiment["tasks"]:
        if loss_curves(results, task):
            found.append(_curve(f"Validation loss: {task}", losses, draw_losses, results, task))
        if difference_curves(results, task):
            name = f"Loss less the rival's: {task}"
            found.append(_curve(name, differences, draw_differences, results, task))
    return found


def _curve(name: str, note: str, panel: _Panel, results: Results, task: str) -> Picture:
    note = f"{note}; bands are 95 % intervals where seeds allow one"
    return draw(name, note, partial(_panel, panel=panel, results=results, task=task))


def _panel(figure: Any, *, panel: _Panel, results: Results, task: str) -> None:
    axes = figure.subplots()
    panel(axes, results, task)
    axes.set_xlabel("step")
