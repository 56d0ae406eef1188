"""Show a run on the terminal: progress of an evaluation, tables of links, differences, scores."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chainlora.config.schema import RunConfig
from chainlora.engine.engine import Speedups
from chainlora.evaluation.right_answers import right_answers
from chainlora.evaluation.stage_scores import StageMatrix, stage_matrix
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState
from chainlora.showing import number
from chainlora.training.progress import OFTEN, Terminal, console_of_bars, console_on_stderr
from chainlora.training.result import TrainResult

_COLUMNS = ["link", "rank", "steps", "loss", "validation", "‖ΔW‖", "effective rank"]
_COLUMNS += ["overlap with earlier"]


@contextmanager
def evaluation_progress(line: str = "scoring {}: row {} of {}") -> Iterator[Callable[..., None]]:
    """Yield a function ``progress([name,] done, total)``.

    It draws a bar on stderr if that is a terminal, and otherwise prints a line now and then.
    """
    console = console_on_stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console_of_bars(console),
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=None)
    last_line = time.monotonic()

    def progress(*values: Any) -> None:
        nonlocal last_line
        *name, done, total = values
        shown = line.format(name[0] if name else "rows", done, total)
        bar.update(task, description=shown.partition(":")[0], completed=done, total=total)
        is_due = done < total and time.monotonic() - last_line >= OFTEN
        if not console.is_terminal and is_due:
            last_line = time.monotonic()
            console.print(shown, highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield progress


def show_inspection(inspection: Mapping[str, Any], *, is_whole: bool = True) -> None:
    """Print the result of `inspect_run`: a table of links, and the plan of each stage.

    Unless `is_whole`, only deviations are printed: an unfinished stage, a selected point.
    """
    console = Terminal()
    # A narrower table would cut numbers; a terminal wraps them.
    console = Terminal(width=max(80, console.width) if console.is_terminal else 140)
    if not is_whole:
        parts: list[Any] = []
    elif inspection["links"]:
        parts = [_table(inspection)]
    else:
        parts = [f"{inspection['run']}: no links on {inspection['base']}"]
    if not inspection["finished"]:
        position = inspection["position"]
        parts.append(
            f"unfinished: {position['links']} of {position['planned_links']} link(s) tied; "
            f"`chainlora train CONFIG` resumes from step {position['step']}"
        )
    for stage, numbers in inspection["numbers"].items():
        if is_whole and numbers["lengths"]:
            name = f" of {stage}" if len(inspection["numbers"]) > 1 else ""
            parts.append(f"planned{name}: {_plan_text(numbers)}")
    if (selected := inspection["selected"]) is not None:
        part = " and a partial one" if selected["partial"] else ""
        count = f"{selected['num_links']} whole link(s){part}"
        parts.append(f"selected: best point at step {selected['step']}, {count}")
    for text in parts:
        console.print(text, highlight=False)


def show_difference(difference: Mapping[str, Any], *, has_modules: bool) -> None:
    """Print the result of `chainlora.diff`: answers that differ, then the weights."""
    parts: list[Any] = [f"a: {difference['a']}, b: {difference['b']}, on {difference['base']}"]
    for stage, row in difference["answers"].items():
        parts.append(_answer_counts(stage, row))
        for answers in row["differ"]:
            parts += [f"  {name}: {' '.join(str(text).split())}" for name, text in answers.items()]
            parts.append("")
    if has_modules:
        parts.append(_module_table(difference))
    else:
        relative = difference["total"]["relative"]
        parts.append(f"the weights differ by {relative:.1%}; --weights lists the modules")
    wide = Terminal(width=max(Terminal().width, 140))
    for part in parts:
        wide.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def _module_table(difference: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0)
    for head in ("module", "‖a‖", "‖b‖", "‖a − b‖", "relative", "rank"):
        table.add_column(head, justify="left" if head == "module" else "right", no_wrap=True)
    for name, row in difference["modules"].items():
        table.add_row(escape(name), *_norms(row))
    table.add_section()
    table.add_row("all", *_norms(difference["total"]))
    return table


def _norms(row: Mapping[str, Any]) -> list[str]:
    norms = [number(row[key], 4) for key in ("norm_a", "norm_b", "difference")]
    return [*norms, f"{row['relative']:.1%}", str(row["rank"])]


def _answer_counts(stage: str, row: Mapping[str, Any]) -> str:
    right = "" if row["right_a"] is None else f"; right: a {row['right_a']}, b {row['right_b']}"
    name = f"{stage}: " if stage else ""
    return f"{name}{len(row['differ'])} of {row['asked']} answers differ{right}"


def _plan_text(numbers: Mapping[str, Any]) -> str:
    """Return the plan of a stage as text: the steps and the soft knots of each link."""
    lengths = _repeated([_steps(steps) for steps in numbers["lengths"]])
    soft = [
        f"{knot[1]:.3f} every {_steps(knot[0])}" if knot else "none" for knot in numbers["knots"]
    ]
    return lengths + (f"; soft knots of {_repeated(soft)}" if any(numbers["knots"]) else "")


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _repeated(texts: Sequence[str]) -> str:
    """Join texts and count equal neighbours: ``2 × 300 steps, 150 steps``."""
    parts = [(len(list(same)), text) for text, same in groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} × {text}" for count, text in parts)


def _table(inspection: Mapping[str, Any]) -> Table:
    """Return the table of links, which fits into 80 columns."""
    are_several = len({row["stage"] for row in inspection["links"]}) > 1
    title = escape(f"{inspection['run']}: chain on {inspection['base']} ({inspection['hold']})")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=column == "validation")
    for row in inspection["links"]:
        # the metrics of the task, or the loss if there are no others
        metrics = [name for name in row["scores"] if name not in ("loss", "perplexity")]
        shown = metrics or [name for name in row["scores"] if name == "loss"]
        scores = ", ".join(f"{name} {row['scores'][name]:.4f}" for name in shown)
        stage = f" {escape(row['stage'])}" if are_several else ""
        rank, trained = str(row["rank"]), str(row["trained_rank"])
        table.add_row(
            f"{row['link']}{stage}",
            rank if rank == trained else f"{trained} (stored {rank})",
            str(row["steps"]),
            number(row["loss"], 4),
            scores or "–",
            number(row["delta_norm"], 4),
            number(row["effective_rank"]),
            ", ".join(f"{value:.2f}" for value in row["overlap"]) or "–",
        )
    whole = inspection["chain"]
    table.add_section()
    steps = str(sum(row["steps"] for row in inspection["links"]))
    sizes = number(whole.get("delta_norm"), 4), number(whole.get("effective_rank"))
    table.add_row("all", str(whole["rank"]), steps, "", "", *sizes, "")
    return table


def scored_matrix(run: str, speedups: Speedups = "auto", *, compute: bool = True) -> StageMatrix:
    """Return the matrix of a run; missing cells are scored, with a progress bar."""
    with evaluation_progress() as progress:
        return stage_matrix(run, speedups=speedups, progress=progress, compute=compute)


def show_matrix(matrix: StageMatrix, *, has_notes: bool = True) -> None:
    """Print a matrix (a row per state, a column per stage) and summaries, if it has scores."""
    if matrix.cells:
        click.echo(str(matrix) if has_notes else matrix.in_lines())


def show_right(state: OpenState, stages: Sequence[str], base: OpenBase) -> None:
    """Print how many of their trained rows a run answers exactly, and where that is few."""
    for name, (asked, right) in right_answers(state, stages, base=base).items():
        click.echo(f"{name}: {right} of {asked} trained rows are answered exactly")
        if 2 * right < asked:
            remedy = "--chain.epochs 20 trains twice as long as 10, --train.lr 2e-3 faster"
            click.echo(f"{name}: few are right; in a new run, {remedy}")


def show_next(
    run: str, result: TrainResult, config: RunConfig, state: OpenState, is_chat: bool
) -> None:
    has_links, report, scored = bool(result["links"]), f"chainlora report {run}", result["metrics"]
    extend = "FILE"
    if config.plugins:
        extend += f" --plugins {shlex.quote(str([*config.plugins]))}"
    kind = "adapter" if has_links else "merged"
    split = "" if "validation" in scored else " --split test"
    commands = [
        f"chainlora chat {run}" if is_chat else f"chainlora generate {run} --prompt TEXT",
        f"chainlora eval {run}{split}; {report}" if scored else report,
        *([f"chainlora extend {run} {extend}"] if has_links else []),
        f"chainlora export {run} --to {kind} --output FOLDER",
    ]
    click.echo("\n  ".join(["next:", *commands]))
