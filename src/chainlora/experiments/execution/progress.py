"""What a person sees while an experiment runs: cells done, those running, time left, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from chainlora.training.progress import console_of_bars


def time_left(
    done: Sequence[tuple[str, float]],
    remaining: Sequence[tuple[str, float]],
    later: int,
    workers: int,
) -> float | None:
    """Return seconds until the last cell ends, or None while nothing is known.

    Args:
        done: (task, seconds) of cells that ended.
        remaining: (task, share still to do) of cells running or waiting.
        later: cells of the next phase, taken for average ones.
        workers: cells at a time.
    """
    if not done:
        return None
    overall = sum(seconds for _, seconds in done) / len(done)
    by_task: dict[str, list[float]] = {}
    for task, seconds in done:
        by_task.setdefault(task, []).append(seconds)
    mean = {task: sum(values) / len(values) for task, values in by_task.items()}
    total = sum(mean.get(task, overall) * share for task, share in remaining) + later * overall
    return total / workers


def experiment_progress() -> Callable[[Mapping[str, Any]], None]:
    """Return a listener for `run_experiment` that shows progress and time left on stderr."""
    return _Listener()


class _Listener:
    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.1f}/{task.total}"),
            TextColumn("{task.fields[left]} left"),
            TextColumn("{task.fields[now]}"),
            console=console_of_bars(self.console),
            disable=not self.console.is_terminal,
        )
        self.done: list[tuple[str, float]] = []
        self.waiting: dict[str, str] = {}
        self.running: dict[str, float] = {}
        self.task: Any = None
        self.ended = 0
        self.later = 0
        self.workers = 1
        self.began: dict[str, float] = {}

    def __call__(self, record: Mapping[str, Any]) -> None:
        getattr(self, f"_{record['event']}")(record)

    def _plan(self, record: Mapping[str, Any]) -> None:
        self.waiting = dict(zip(record["todo"], record["tasks"], strict=True))
        self.workers, self.ended = record["workers"], 0
        self.later = record["later"] if not record["left_out"] else 0
        self._say(_plan_in_words(record))
        for note in record["notes"]:
            self._say(f"note: {note}", style="yellow")
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(record["phase"], total=len(self.waiting), left="?", now="")
        self.bar.start()

    def _say(self, line: str, style: str | None = None) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)

    def _poll(self, record: Mapping[str, Any]) -> None:
        self.running = dict(record["running"])
        self.workers = max(self.workers, len(self.running))  # "auto" starts with one
        for name in self.running:
            self.began.setdefault(name, time.monotonic())
        now = "; ".join(f"{name} {share:.0%}" for name, share in self.running.items())
        self.bar.update(
            self.task, completed=self.ended + sum(self.running.values()), left=self._left(), now=now
        )

    def _left(self) -> str:
        remaining = [(task, 1 - self.running.get(name, 0.0)) for name, task in self.waiting.items()]
        seconds = time_left(self.done, remaining, self.later, self.workers)
        if seconds is None:
            return "?"
        if seconds >= 5400:
            return f"{seconds / 3600:.1f} h"
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    def _cell(self, record: Mapping[str, Any]) -> None:
        name = record["cell"]
        self.waiting.pop(name, None)
        self.running.pop(name, None)
        self.ended += 1
        seconds = time.monotonic() - self.began.get(name, time.monotonic())
        if record["error"] is None:
            self.done.append((record["task"], max(seconds, record.get("wall_s") or 0.0)))
        self._say(f"{name}: {_outcome(record)}; {len(self.waiting)} to go, {self._left()} left")

    def _end(self, record: Mapping[str, Any]) -> None:
        self.bar.stop()
        for name, error in record["failed"].items():
            self._say(f"failed: {name}: {error}", style="red")


def _plan_in_words(record: Mapping[str, Any]) -> str:
    words = [
        f"{record['phase']}: {record['cells']} cells",
        f"{record['done']} done before",
        f"{len(record['todo'])} to run",
    ]
    if record["left_out"]:
        words.append(f"{record['left_out']} left for another call (--max-cells)")
    if record["later"]:
        words.append(f"then {record['later']} final cells")
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
