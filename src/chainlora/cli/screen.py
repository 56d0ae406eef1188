"""What a person sees of a run that is there: the progress of an evaluation, tables of links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chainlora.reports.charts import number
from chainlora.training.progress import console_of_bars, console_on_stderr

_COLUMNS = (
    "link",
    "rank",
    "steps",
    "loss",
    "validation",
    "‖ΔW‖",
    "effective rank",
    "overlap with earlier",
)


@contextmanager
def evaluation_progress() -> Iterator[Callable[..., None]]:
    """Give a ``progress([what,] rows_done, rows)`` that draws a bar on stderr, if a terminal."""
    console = console_on_stderr()
    bar = Progress(
        TextColumn("rows"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console_of_bars(console),
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("rows", total=None)
    with bar:
        yield lambda *told: bar.update(task, completed=told[-2], total=told[-1])


def show_inspection(found: Mapping[str, Any]) -> None:
    """Print what `inspect_run` found: a row a link, and the chain as a whole."""
    console = Console()
    # what is narrower would cut numbers; a terminal wraps them
    console = Console(width=max(80, console.width) if console.is_terminal else 140)
    if found["links"]:
        console.print(_table(found), highlight=False)
    else:
        console.print(f"{found['run']}: no links on {found['base']}", highlight=False)
    if not found["finished"]:
        position = found["position"]
        console.print(
            f"unfinished: {position['links']} of {position['planned_links']} link(s) tied; "
            f"`chainlora train CONFIG` resumes from step {position['step']}",
            highlight=False,
        )
    if found["unjudged"] is not None:
        console.print(
            f"not judged: stage {escape(found['unjudged'])} is trained but not yet judged by "
            "accept_links; run the command that trained it again",
            highlight=False,
        )
    planned = {name: each for name, each in found["numbers"].items() if each["lengths"]}
    for stage, numbers in planned.items():
        name = f" of {stage}" if len(found["numbers"]) > 1 else ""
        console.print(f"planned{name}: {_decided(numbers)}", highlight=False)
    if found["selected"] is not None:
        step, whole_links = found["selected"]["step"], found["selected"]["num_links"]
        part = " and a partial one" if found["selected"]["partial"] else ""
        console.print(
            f"selected: best point at step {step}, {whole_links} whole link(s){part}",
            highlight=False,
        )


def _decided(numbers: Mapping[str, Any]) -> str:
    """Say what was decided when a stage began: steps of each link, its soft knots."""
    lengths = _repeated([_steps(steps) for steps in numbers["lengths"]])
    soft = [
        f"{each[1]:.3f} every {_steps(each[0])}" if each else "none" for each in numbers["knots"]
    ]
    return lengths + (f"; soft knots of {_repeated(soft)}" if any(numbers["knots"]) else "")


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _repeated(texts: Sequence[str]) -> str:
    """Join texts, equal neighbours as one: ``2 × 300 steps, 150 steps``."""
    parts = [(len(list(same)), text) for text, same in groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} × {text}" for count, text in parts)


def _table(found: Mapping[str, Any]) -> Table:
    """Return the table of links, which 80 columns hold."""
    are_several = len({row["stage"] for row in found["links"]}) > 1
    title = escape(f"{found['run']}: chain on {found['base']} ({found['hold']})")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=column == "validation")
    for row in found["links"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in _telling(row["scores"]).items())
        table.add_row(
            str(row["link"]) + (_stage(row) if are_several else ""),
            _rank(row),
            str(row["steps"]),
            number(row["loss"], 4),
            scores or "–",
            number(row.get("delta_norm"), 4),
            number(row.get("effective_rank")),
            ", ".join(f"{value:.2f}" for value in row.get("overlap", [])) or "–",
        )
    whole = found["chain"]
    table.add_section()
    table.add_row(
        "all",
        str(whole["rank"]),
        str(sum(row["steps"] for row in found["links"])),
        "",
        "",
        number(whole.get("delta_norm"), 4),
        number(whole.get("effective_rank")),
        "",
    )
    return table


def _stage(row: Mapping[str, Any]) -> str:
    """Return the stage of a link, and its strength where that is not 1."""
    strength = "" if row["strength"] == 1 else f" × {row['strength']:g}"
    return f" {escape(row['stage'])}{strength}"


def _rank(row: Mapping[str, Any]) -> str:
    """Return the rank that a link was trained with, and the stored one where that is another."""
    stored, trained = row["rank"], row["trained_rank"]
    return str(stored) if stored == trained else f"{trained} (stored {stored})"


def _telling(scores: Mapping[str, float]) -> Mapping[str, float]:
    """What a task is judged by; the loss where it has nothing else."""
    judged = {name: value for name, value in scores.items() if name not in ("loss", "perplexity")}
    return judged or {name: value for name, value in scores.items() if name == "loss"}
