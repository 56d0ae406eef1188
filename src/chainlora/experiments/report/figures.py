"""Figures of a report, as PNG and SVG: seeds as dots, means as bars, the paper's as diamonds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from chainlora.errors import RunError
from chainlora.evaluation.metrics import is_higher_better
from chainlora.experiments.design.paper import paper_model
from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.comparisons import Comparison
from chainlora.experiments.report.curve_figures import curves
from chainlora.experiments.report.summaries import Summary
from chainlora.experiments.report.values import by_seed
from chainlora.experiments.statistics.pairs import VERDICTS, Verdict

_PANEL = 3.2  # inches
_BLUE = "#0969da"
_DIAMOND: dict[str, Any] = {"marker": "D", "color": "#bf8700", "markersize": 5, "fillstyle": "none"}
_BAR: dict[str, Any] = {"marker": "_", "color": _BLUE, "markersize": 16, "markeredgewidth": 2}
_COLOURS = dict(zip(VERDICTS, ("#1a7f37", "#cf222e", "#57606a", "#bfc4ca"), strict=True))


def draw_figures(
    results: Results,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    out: Path,
) -> list[Path]:
    """Draw the figures that the experiment asks for into `out`; return the files.

    Raises RunError for a figure that is not known.
    """
    makers: dict[str, Callable[[], Any]] = {
        "scores": lambda: scores(results, summaries),
        "differences": lambda: differences(comparisons),
        "curves": lambda: curves(results),
        "chain_length": lambda: chain_length(results, summaries),
        "rank_step_down": lambda: rank_step_down(results, summaries),
    }
    written: list[Path] = []
    for name in results.experiment["figures"]:
        if name not in makers:
            raise RunError(
                f"a figure must be one of {', '.join(makers)} (got {name!r} in the results)"
            )
        figure = makers[name]() if summaries and (comparisons or name != "differences") else None
        if figure is not None:
            written += [_save(figure, out / f"{name}.{suffix}") for suffix in ("png", "svg")]
            plt.close(figure)
    return written


def _save(figure: Any, path: Path) -> Path:
    """Write a figure without dates and with fixed ids: the same results give the same file."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with plt.rc_context({"svg.hashsalt": "chainlora"}):
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def scores(results: Results, summaries: Sequence[Summary]) -> Any:
    """Return the score of every method on every task: dots for seeds, a bar for the mean."""
    return _by_method(results, summaries, lambda summary: summary.method)


def rank_step_down(results: Results, summaries: Sequence[Summary]) -> Any:
    """Return the paper's Figure 3: score by the ranks of the links."""
    return _by_method(results, summaries, _ranks)


def _ranks(summary: Summary) -> str:
    ranks = ", ".join(map(str, summary.ranks))
    return f"LoRA {ranks}" if len(summary.ranks) == 1 else f"({ranks})"


def _by_method(
    results: Results, summaries: Sequence[Summary], label: Callable[[Summary], str]
) -> Any:
    tasks = list(dict.fromkeys(s.task for s in summaries))
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        own = _of_task(summaries, task)
        for place, summary in enumerate(own):
            _draw_method(axis, place, results, summary)
        _decorate(axis, task, own[0])
        axis.set_xlim(-0.5, len(own) - 0.5)
        axis.set_xticks(
            range(len(own)), [label(s) for s in own], rotation=60, ha="right", fontsize=8
        )
    _add_key(figure, results, summaries)
    return figure


def _add_key(figure: Any, results: Results, summaries: Sequence[Summary]) -> None:
    """Say below the panels what dots, bars, dotted lines and diamonds are."""
    keys = [
        Line2D(
            [], [], color=_BLUE, alpha=0.4, marker="o", linestyle="", markersize=4, label="a seed"
        ),
        Line2D([], [], color=_BLUE, linewidth=2, label="mean"),
    ]
    if any(summary.majority is not None for summary in summaries):
        keys.append(
            Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="commonest answer")
        )
    if any(summary.paper is not None for summary in summaries):
        label = f"paper ({paper_model(results.experiment['paper'])})"
        keys.append(Line2D([], [], **_DIAMOND, linestyle="", label=label))
    columns = len(keys) if figure.get_figwidth() > 5 else 2
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )


def _draw_method(axis: Any, place: float, results: Results, summary: Summary) -> None:
    values = list(by_seed(results, summary.task, summary.method).values())
    seeds = [place] * len(values)
    axis.plot(seeds, values, "o", color=_BLUE, alpha=0.4, markersize=4, label="seeds")
    axis.plot([place], [summary.mean], **_BAR, label="mean")
    if summary.paper is not None:
        axis.plot([place], [summary.paper], **_DIAMOND, label="paper")


def chain_length(results: Results, summaries: Sequence[Summary]) -> Any:
    """Return the paper's Figure 2: score by the number of links, a line for each kind of chain."""
    tasks = list(dict.fromkeys(s.task for s in summaries))
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        own = [s for s in _of_task(summaries, task) if s.ranks]
        if not own:
            axis.remove()
            continue
        kinds: dict[str, list[Summary]] = {}
        for summary in own:
            kinds.setdefault(_kind(results, summary), []).append(summary)
        for kind, group in kinds.items():
            group = sorted(group, key=lambda s: len(s.ranks))
            places = [len(s.ranks) for s in group]
            errors = [0.0 if s.num_seeds < 2 else s.sd for s in group]
            axis.errorbar(
                places, [s.mean for s in group], errors, marker="o", capsize=3, label=kind
            )
            printed = [
                (n, s.paper) for n, s in zip(places, group, strict=True) if s.paper is not None
            ]
            if printed:
                label = f"paper ({paper_model(results.experiment['paper'])})"
                axis.plot(*zip(*printed, strict=True), **_DIAMOND, linestyle="--", label=label)
        _decorate(axis, task, own[0])
        axis.set_xticks(sorted({len(s.ranks) for s in own}))
        axis.set_xlabel("links")
        axis.legend(fontsize=7)
    return figure


def _kind(results: Results, summary: Summary) -> str:
    """What a chain is beside its length: rank, start, schedule, factors."""
    cell = next(
        c for c in results.finals if c["task"] == summary.task and c["method"] == summary.method
    )
    chain, train = cell["config"].get("chain", {}), cell["config"].get("train", {})
    words = [f"rank {summary.ranks[0]}"]
    words += [f"{chain[key]}" for key in ("init", "tune") if key in chain]
    words += [key for key in ("dora", "rslora") if chain.get(key)]
    words += ["restarts"] if train.get("restart_schedule") else []
    words += [f"trains {chain['train_factors']}"] if "train_factors" in chain else []
    words += [f"reset {train['optimizer_reset']}"] if "optimizer_reset" in train else []
    return ", ".join(words)


def differences(comparisons: Sequence[Comparison], *, width: float = 6.5) -> Any:
    """Return a forest plot of the paired differences, coloured by verdict, a panel a unit."""
    several = len({comparison.task for comparison in comparisons}) > 1
    units: dict[str, list[Comparison]] = {}
    for comparison in reversed(comparisons):
        units.setdefault("points" if is_higher_better(comparison.metric) else "loss", []).append(
            comparison
        )
    sizes = [1 + len(group) for group in units.values()]
    figure, axes = plt.subplots(
        len(units),
        figsize=(width, (0.9 if width > 5 else 1.3) * len(units) + 0.28 * sum(sizes)),
        height_ratios=sizes,
        squeeze=False,
        layout="constrained",
    )
    for axis, (unit, group) in zip(axes.flat, units.items(), strict=True):
        for place, comparison in enumerate(group):
            d = comparison.difference
            colour, ends = _COLOURS[d.verdict], [d.low, d.high]
            mark = _mark(d.verdict)
            axis.plot([d.mean], [place], **mark, linestyle="", label="difference")
            if d.interval != "none":
                axis.plot(ends, [place, place], color=colour, label="95 % interval")
        names = [
            f"{c.task}: " * several + f"{c.method} − {c.rival} (n={c.difference.num_pairs})"
            for c in group
        ]
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(
            f"difference in {group[0].value} ({unit}), {group[0].better} is better\n"
            "(95 % interval)",
            fontsize=9,
        )
    keys = [Line2D([], [], **_mark(verdict), label=verdict) for verdict in _COLOURS]
    columns = len(keys) if width > 5 else 2
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )
    return figure


def _mark(verdict: Verdict) -> dict[str, Any]:
    """Return a square in the verdict's colour; an empty one says that nothing could be decided."""
    colour = _COLOURS[verdict]
    fill = "#FFFFFF" if verdict == "too few pairs" else colour
    return {"color": colour, "marker": "s", "markersize": 5, "markerfacecolor": fill, "zorder": 3}


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(_PANEL * columns, _PANEL * rows),
        squeeze=False,
        layout="constrained",
    )
    flat = list(grid.flat)
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


def _decorate(axis: Any, task: str, summary: Summary) -> None:
    axis.set_title(task, fontsize=10)
    axis.set_ylabel(
        summary.metric + (" (%)" if summary.metric not in ("loss", "perplexity") else ""),
        fontsize=8,
    )
    if summary.majority is not None:
        name = "commonest answer"
        axis.axhline(summary.majority, color="black", linestyle=":", linewidth=0.8, gid=name)
    axis.grid(axis="y", alpha=0.3)


def _of_task(summaries: Sequence[Summary], task: str) -> list[Summary]:
    return [summary for summary in summaries if summary.task == task]
