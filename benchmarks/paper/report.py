"""The report of an experiment with the paper's numbers and figures beside ours.

    python benchmarks/paper/report.py benchmarks/paper/table1 [OUTPUT]

It is the report of `chainlora experiment report` with one more section (the scores that the paper
prints for the table that the experiment's `paper` names, operations, what rank step-down saves) and
two more charts: `chain_length` (Figure 2) and `rank_step_down` (Figure 3).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from flops import cell_costs  # noqa: E402

from chainlora.config.reading import read_tree  # noqa: E402
from chainlora.errors import ConfigError, nearest  # noqa: E402
from chainlora_lab import report_experiment  # noqa: E402
from chainlora_lab.report.comparisons import Facts  # noqa: E402
from chainlora_lab.report.pictures import (  # noqa: E402
    CHARTS,
    Chart,
    draw_scores,
    name_metric,
    of_task,
)
from chainlora_lab.report.report import Report  # noqa: E402
from chainlora_lab.report.sections import SECTIONS  # noqa: E402
from chainlora_lab.report.values import Summary, big, cells_of  # noqa: E402
from chainlora_pages import (  # noqa: E402
    Numbers,
    Section,
    Table,
    Text,
    line_style,
    number,
    section,
    whole_steps,
)

PRINTED: Mapping[str, Any] = read_tree(HERE / "printed/tables.yaml", "tables")
_DIAMOND: dict[str, Any] = {"marker": "D", "color": "#BF8700", "markersize": 5, "fillstyle": "none"}


def report(results: str | Path, out: str | Path | None = None) -> Report:
    """Make the report. Raises ConfigError for a table that the paper does not have."""
    folder = Path(results) if Path(results).is_dir() else Path(results).parent
    sections = [*SECTIONS, partial(paper, folder=folder)]
    return report_experiment(results, out, sections=sections, charts=[*CHARTS, *FIGURES])


def printed(facts: Facts) -> Mapping[str, Any]:
    """Return what the paper prints of the table that an experiment names; nothing for none."""
    name = facts.results.experiment.get("paper")
    if name is not None and name not in PRINTED:
        raise ConfigError(
            f"`paper` must be one of {', '.join(PRINTED)} (got {name!r}){nearest(name, PRINTED)}"
        )
    return {} if name is None else PRINTED[name]


def paper(facts: Facts, folder: Path) -> Section:
    """Return the paper's scores, and operations: counted, by the paper's rule, and saved."""
    costs = _costs(facts, folder)
    tables = [_scores(facts), _operations(costs), _savings(facts, costs)]
    missing = len(costs) < len(facts.summaries)
    said = "Operations are counted where a cell's run directory is at hand."
    return section("The paper", *map(Numbers, tables), Text(said) if missing else None)


def _scores(facts: Facts) -> Table:
    table = printed(facts)
    scores, spreads = table.get("scores", {}), table.get("sd", {})
    rows = []
    for method in facts.results.experiment["methods"]:
        own = scores.get(method, {})
        if any(task in own for task in facts.tasks):
            cells = [_with_spread(own, spreads.get(method, {}), task) for task in facts.tasks]
            rows.append((f"paper: {method} ({table['model']})", *cells))
    return Table("Scores that the paper prints", ("method", *facts.tasks), tuple(rows))


def _with_spread(means: Mapping[str, float], spreads: Mapping[str, float], task: str) -> str:
    spread = f" ± {number(spreads[task])}" if task in spreads else ""
    return number(means.get(task)) + spread


# --- operations ---


def _costs(facts: Facts, folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Return the mean operations a run, by task and method; none where they cannot be counted."""
    found = {}
    for summary in facts.summaries:
        cells = cells_of(facts.results, summary.task, summary.method)
        try:
            costs = [cell_costs(cell, folder / "cells" / cell["cell"] / "run") for cell in cells]
        except FileNotFoundError:
            continue
        means = {key: fmean(cost[key] for cost in costs) for key in costs[0]}
        found[summary.task, summary.method] = means
    return found


def _operations(costs: Mapping[tuple[str, str], Mapping[str, float]]) -> Table:
    rows = tuple(
        (f"{task} {method}", big(cost["flops"]), big(cost["flops_6nd"]))
        for (task, method), cost in costs.items()
    )
    note = (
        "Means per run. FLOPs: counted, forward and backward, with what gradient starts read. "
        "6·N·D: the paper's rule, N the parameters trained."
    )
    return Table("Operations", ("task and method", "FLOPs", "6·N·D"), rows, note)


def _savings(facts: Facts, costs: Mapping[tuple[str, str], Mapping[str, float]]) -> Table:
    table = printed(facts)
    rival, theirs = table.get("saved_against", ""), table.get("flops_saved", {})
    rows = []
    for (task, method), cost in costs.items():
        full = costs.get((task, rival))
        if method in theirs and full is not None:
            saved = full["flops_6nd"] - cost["flops_6nd"]
            share = (full["flops"] - cost["flops"]) / full["flops"]
            shown = big(theirs[method][task]) if task in theirs[method] else "–"
            rows.append((f"{task} {method}", big(saved), shown, f"{share:.3%}"))
    heads = ("task and method", "6·N·D saved", "paper", "share of counted FLOPs saved")
    return Table(f"Operations saved against {rival}", heads, tuple(rows))


# --- Figures 2 and 3 ---


def draw_chain_length(axes: Any, facts: Facts, task: str) -> None:
    """Draw the score by the number of links, a line for each kind of chain."""
    own = [summary for summary in of_task(facts, task) if summary.ranks]
    kinds: dict[str, list[Summary]] = {}
    for summary in own:
        kinds.setdefault(_kind(facts, summary), []).append(summary)
    for place, (kind, group) in enumerate(kinds.items()):
        group = sorted(group, key=lambda s: len(s.ranks))
        lengths = [len(s.ranks) for s in group]
        errors = [0.0 if s.num_seeds < 2 else s.sd for s in group]
        style = line_style(place) | {"marker": "o", "capsize": 3}
        axes.errorbar(lengths, [s.mean for s in group], errors, label=kind, **style)
    _draw_printed(axes, facts, task, [(s, len(s.ranks)) for s in own])
    name_metric(axes, own[0])
    whole_steps(axes.xaxis)
    axes.set_xlabel("links")


def _kind(facts: Facts, summary: Summary) -> str:
    """Return what a chain is beside its length: rank, start, schedule."""
    config = cells_of(facts.results, summary.task, summary.method)[0]["config"]
    chain, train = config.get("chain", {}), config.get("train", {})
    words = [f"rank {summary.ranks[0]}", chain.get("init"), config.get("loop")]
    words += ["rslora" if chain.get("rslora") else None]
    words += ["restarts" if train.get("restart_schedule") else None]
    words += [f"reset {train['optimizer_reset']}" if "optimizer_reset" in train else None]
    return ", ".join(filter(None, words))


def draw_rank_step_down(axes: Any, facts: Facts, task: str) -> None:
    """Draw the scores by the ranks of the links."""
    draw_scores(axes, facts, task)
    own = of_task(facts, task)
    names = [", ".join(map(str, s.ranks)) for s in own]
    shown = [
        f"LoRA {n}" if len(s.ranks) == 1 else f"({n})" for n, s in zip(names, own, strict=True)
    ]
    axes.set_xticks(range(len(own)), shown)
    _draw_printed(axes, facts, task, [(s, place) for place, s in enumerate(own)])


def _draw_printed(
    axes: Any, facts: Facts, task: str, places: Sequence[tuple[Summary, float]]
) -> None:
    table = printed(facts)
    scores = table.get("scores", {})
    points = [(x, scores[s.method][task]) for s, x in places if task in scores.get(s.method, {})]
    if points:
        axes.plot(*zip(*points, strict=True), linestyle="", label="paper", **_DIAMOND)


FIGURES = (
    Chart(
        name="chain_length",
        figure="chain_length",
        section="The paper",
        title="Score by the number of links",
        draw=draw_chain_length,
        tasks=lambda facts: [t for t in facts.tasks if any(s.ranks for s in of_task(facts, t))],
    ),
    Chart(
        name="rank_step_down",
        figure="rank_step_down",
        section="The paper",
        title="Score by the ranks of the links",
        draw=draw_rank_step_down,
        tasks=lambda facts: facts.tasks,
    ),
)


if __name__ == "__main__":
    print(report(*sys.argv[1:3]).markdown)
