"""What a person sees while an experiment runs: cells done, those running, time left, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from chainlora.training.progress import console_of_bars, console_on_stderr, duration


def experiment_progress() -> Callable[[Mapping[str, Any]], None]:
    """Return a listener for `run_experiment` that shows progress and time left on stderr."""
    console = console_on_stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=console_of_bars(console),
        disable=not console.is_terminal,
        speed_estimate_period=86_400,  # seconds: a cell may take hours
    )

    began, num_ended = time.monotonic(), 0

    def say(line: str, style: str | None = None) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)

    def listen(record: Mapping[str, Any]) -> None:
        nonlocal began, num_ended
        if record["event"] == "plan":
            began, num_ended = time.monotonic(), 0
            say(_plan_in_words(record))
            for note in record["notes"]:
                say(f"note: {note}", style="yellow")
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(record["phase"], total=len(record["todo"]), now="")
            bar.start()
        elif record["event"] == "poll":
            bar.update(bar.task_ids[-1], now="; ".join(record["running"]))
        elif record["event"] == "cell":
            bar.advance(bar.task_ids[-1])
            num_ended += 1
            seconds = (time.monotonic() - began) / num_ended * record["left"]
            left = f", about {duration(seconds)} left" if record["left"] else ""
            say(f"{record['cell']}: {_outcome(record)}; {record['left']} to go{left}")
        else:
            bar.stop()
            for name, error in record["failed"].items():
                say(f"failed: {name}: {error}", style="red")

    return listen


def _plan_in_words(record: Mapping[str, Any]) -> str:
    words = [
        f"{record['phase']}: {record['cells']} cells",
        f"{record['done']} done before",
        f"{len(record['todo'])} to run",
    ]
    if record["left_out"]:
        words.append(f"{record['left_out']} left for another call (--max-cells)")
    return ", ".join(words)


def _outcome(record: Mapping[str, Any]) -> str:
    if record["error"] is not None:
        return f"FAILED, {record['error']}"
    if record["status"] == "diverged":
        return "diverged"
    if record["score"] is None:
        return "done"
    split = "validation " if record["split"] == "validation" else ""
    return f"{split}{record['metric']} {record['score']:.4f} in {record['wall_s']:.0f} s"
