"""What a person sees of a run: the progress bar on stderr, tables of links on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chainlora.runs.inspection import inspect_run


@contextmanager
def progress_listener() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a listener for `train` that draws link, step, loss, learning rate, tokens/s and time
    left on stderr.

    The bar goes when the context ends, however it ends, and leaves the terminal as it was.
    """
    listener = _Listener()
    try:
        yield listener
    finally:
        listener.bar.stop()


@contextmanager
def evaluation_progress() -> Iterator[Callable[[int, int], None]]:
    """Give a ``progress(rows_done, rows)`` that draws rows and time left on stderr, if somebody is
    there to see it."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("rows"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("rows", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Listener:
    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("link {task.fields[link]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("lr {task.fields[rate]:.1e}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.loss: float | None = None
        self.speed: float | None = None

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, record: Mapping[str, Any]) -> None:
        getattr(self, f"_{record['event']}", lambda _: None)(record)

    def _plan(self, record: Mapping[str, Any]) -> None:
        self.total = record["num_steps"]
        lengths = " + ".join(map(str, record["lengths"]))
        self._say(
            f"{record['rows']} training rows, {record['num_steps']} steps ({lengths})"
            + (f", going on after step {record['step']}" if record["step"] else "")
        )
        self.task = self.bar.add_task(
            "train",
            total=record["num_steps"],
            completed=record["step"],
            link=0,
            loss="–",
            rate=0.0,
            speed=0.0,
        )
        self.bar.start()

    def _step(self, record: Mapping[str, Any]) -> None:
        speed = record["tokens"] / max(record["seconds"], 1e-9)
        self.loss = record["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * record["loss"]
        self.speed = speed if self.speed is None else 0.9 * self.speed + 0.1 * speed
        self.bar.update(
            self.task,
            completed=record["step"],
            link=record["link"],
            loss=f"{self.loss:.4f}",
            rate=record["learning_rate"],
            speed=self.speed,
        )
        if record["step"] >= self.total:
            self.bar.stop()

    def _eval(self, record: Mapping[str, Any]) -> None:
        scores = ", ".join(
            f"{k} {v:.4f}"
            for k, v in record.items()
            if k not in ("event", "step", "link", "where") and isinstance(v, float)
        )
        place = {"start": "before training", "knot": f"after link {record['link']}"}.get(
            record["where"], f"link {record['link']}"
        )
        self._say(f"step {record['step']:>5}  {place}: validation {scores}")

    def _knot(self, record: Mapping[str, Any]) -> None:
        self._say(
            f"step {record['step']:>5}  link {record['link']} tied (function changed by "
            f"{record['function_change']:.1e})"
        )


def show_links(run: str | Path) -> None:
    """Print the table of a run's links."""
    show_inspection(inspect_run(run))


def show_inspection(found: Mapping[str, Any]) -> None:
    """Print what `inspect_run` found: a row a link, and the chain as a whole."""
    table = Table(
        title=escape(f"{found['run']}: chain on {found['base']} ({found['hold']})"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )  # 80 columns hold it
    for column in (
        "link",
        "rank",
        "steps",
        "loss",
        "validation",
        "‖ΔW‖",
        "effective rank",
        "overlap with earlier",
    ):
        table.add_column(column, justify="right", no_wrap=column == "validation")
    for row in found["links"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in _telling(row["scores"]).items())
        table.add_row(
            str(row["link"]),
            str(row["rank"]),
            str(row["steps"]),
            _number(row["loss"]),
            scores or "–",
            _number(row.get("delta_norm")),
            _number(row.get("effective_rank"), 2),
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
        _number(whole.get("delta_norm")),
        _number(whole.get("effective_rank"), 2),
        "",
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table, highlight=False)
    if found["selected"] is not None:
        step, whole_links = found["selected"]["step"], found["selected"]["num_links"]
        part = " and a partial one" if found["selected"]["partial"] else ""
        console.print(
            f"selected: best point at step {step}, {whole_links} whole link(s){part}",
            highlight=False,
        )


def _telling(scores: Mapping[str, float]) -> Mapping[str, float]:
    """What a task is judged by; the loss where it has nothing else."""
    judged = {name: value for name, value in scores.items() if name not in ("loss", "perplexity")}
    return judged or {name: value for name, value in scores.items() if name == "loss"}


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
