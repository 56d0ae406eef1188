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
from chainlora.training.events import (
    Evaluated,
    Event,
    KnotTied,
    Listener,
    Planned,
    RowsEncoded,
    StepDone,
)


@contextmanager
def progress_listener() -> Iterator[Listener]:
    """Give a listener for `train` that draws link, step, loss, learning rate, tokens/s and time
    left on stderr.

    The bar goes when the context ends, however it ends, and leaves the terminal as it was.
    """
    listener = _Listener()
    try:
        yield listener
    finally:
        listener.encoding.stop()
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
        self.encoding = Progress(
            TextColumn("tokenising {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.splits: dict[str, Any] = {}
        self.task: Any = None
        self.total = 0
        self.loss: float | None = None
        self.speed: float | None = None

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        match event:
            case RowsEncoded():
                self._encoded(event)
            case Planned():
                self._plan(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case KnotTied():
                self._say(
                    f"step {event.step:>5}  link {event.link} tied "
                    f"(function changed by {event.function_change:.1e})"
                )

    def _encoded(self, event: RowsEncoded) -> None:
        if event.split not in self.splits:
            self.splits[event.split] = self.encoding.add_task(event.split, total=1.0, rows=0)
            self.encoding.start()
        self.encoding.update(self.splits[event.split], completed=event.share, rows=event.rows)

    def _plan(self, event: Planned) -> None:
        self.encoding.stop()
        self.total = event.num_steps
        lengths = " + ".join(map(str, event.lengths))
        resumed = f", resuming after step {event.step}" if event.step else ""
        self._say(f"{event.rows} training rows, {event.num_steps} steps ({lengths}){resumed}")
        for split, found in event.data.items():
            if "recognised" in found:
                self._say(f"{split}: rows recognised as {found['recognised']} (data.format)")
        self.task = self.bar.add_task(
            "train",
            total=event.num_steps,
            completed=event.step,
            link=0,
            loss="–",
            rate=0.0,
            speed=0.0,
        )
        self.bar.start()

    def _step(self, event: StepDone) -> None:
        self.loss = _smoothed(self.loss, event.loss)
        self.speed = _smoothed(self.speed, event.tokens / max(event.seconds, 1e-9))
        self.bar.update(
            self.task,
            completed=event.step,
            link=event.link,
            loss=f"{self.loss:.4f}",
            rate=event.learning_rate,
            speed=self.speed,
        )
        if event.step >= self.total:
            self.bar.stop()

    def _evaluated(self, event: Evaluated) -> None:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
        places = {"start": "before training", "knot": f"after link {event.link}"}
        place = places.get(event.where, f"link {event.link}")
        self._say(f"step {event.step:>5}  {place}: validation {scores}")


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.9 * before + 0.1 * value


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
    if not found["finished"]:
        position = found["position"]
        console.print(
            f"unfinished: {position['links']} of {position['planned_links']} link(s) tied; "
            f"`chainlora train CONFIG --resume` resumes from step {position['step']}",
            highlight=False,
        )
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
