"""Show the progress of a run: a bar on a terminal, lines in a notebook or a log file."""

from __future__ import annotations

import math
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from chainlora.errors import printable
from chainlora.runs.entries import START
from chainlora.training.events import (
    AlreadyFinished,
    EntryBuilt,
    Evaluated,
    Event,
    ForgettingHeld,
    KeptRowsRead,
    KnotTied,
    LayerSolved,
    Listener,
    Planned,
    ReferenceScored,
    RowsEncoded,
    StageBegins,
    StepDone,
)

_LINES = 10  # lines in a run without `train.log_every`
_RECENT, _ENOUGH = 25, 5  # most and fewest steps for the time left, a median: first steps are slow
_SILENCE = 60.0  # seconds after which a line is printed in any case
_WORK = {"stage": "training", "combine": "combining", "import": "importing"}
OFTEN = 10.0  # seconds between lines while rows are read or layers solved


@contextmanager
def progress_listener(is_verbose: bool = False) -> Iterator[Listener]:
    """Yield a listener for `train` that shows loss, tokens/s and time left on stderr.

    A terminal shows a bar, which is removed at the end, also after an error. A log file or notebook
    gets a line every `train.log_every` steps. `is_verbose` adds learning rates, knots, and the
    distances of combinations from their parts.
    """
    listener = _Listener(is_verbose)
    try:
        yield listener
        listener.tell_times()
    finally:
        listener.reading.stop()
        listener.bar.stop()


class Terminal(Console):
    """A rich console that writes control characters as escapes, like the output of `cli`."""

    def __init__(self, *, stderr: bool = False, **keys: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(file=getattr(stream, "unescaped", None), stderr=stderr, **keys)

    def render_str(self, text: str, **keys: Any) -> Text:
        return super().render_str(printable(text), **keys)


def console_on_stderr() -> Console:
    """Return the console for progress. It draws bars only if stderr is a terminal.

    A notebook is no terminal, although it sets FORCE_COLOR: rich would need widgets there, or print
    each frame of a bar on a new line.
    """
    isatty = getattr(sys.stderr, "isatty", bool)  # stderr may be None, or any object
    return Terminal(stderr=True, force_jupyter=False, force_terminal=isatty())


def console_of_bars(console: Console) -> Console:
    """Return the console for bars: a silent one if bars are disabled.

    Otherwise rich before 14.3 writes an empty line for each disabled bar.
    """
    return console if console.is_terminal else Console(quiet=True)


class _Listener:
    def __init__(self, is_verbose: bool) -> None:
        self.is_verbose, self.console = is_verbose, console_on_stderr()
        bars: Any = {
            "console": console_of_bars(self.console),
            "disable": not self.console.is_terminal,
        }
        self.bar = Progress(
            TextColumn("{task.fields[link]}step"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]} (smoothed){task.fields[rate]}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TextColumn("{task.fields[left]}"),
            **bars,
        )
        self.reading = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            transient=True,
            **bars,
        )
        self.splits: dict[str, Any] = {}
        self.began = self.last_event = self.last_line = time.monotonic()
        self.built = dict[str, float]()  # seconds by kind of work

    def tell_times(self) -> None:
        """Print what took how long, if entries were built."""
        if self.built:
            whole = time.monotonic() - self.began
            parts = self.built | {"loading and scoring": whole - sum(self.built.values())}
            told = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items())
            self._print(f"took {duration(whole)}: {told}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        match event:
            case RowsEncoded():
                self._read(f"tokenising {event.split}", f"{event.rows:,} rows", event.share)
            case ReferenceScored():
                self._read(f"scoring {event.split}", f"{event.rows:,} rows", event.share)
            case KeptRowsRead():
                name = f"{event.what}, " if event.what else ""
                self._read(event.doing, f"{name}{event.rows:,} rows", event.share)
            case LayerSolved():
                parts, _, unit = event.parts.rpartition(": ")
                detail = f"{unit} {event.layer or 1} of {event.layers}"
                share = event.layer / event.layers
                self._read(f"combining {parts}", detail, share, is_first=event.layer == 0)
            case Planned():
                self._plan(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case KnotTied() if self.is_verbose:
                self._print(
                    f"step {event.step:>5}  link {event.link} tied "
                    f"(rounding changed the function by {event.function_change:.1e})"
                )
            case EntryBuilt() if (what := _WORK.get(event.kind)) and event.entry != START:
                self.built[what] = self.built.get(what, 0.0) + event.seconds
        match event:
            case StageBegins() | EntryBuilt() | ForgettingHeld() | AlreadyFinished():
                if line := self._line_of(event):
                    self._print(line)
        self.last_event = time.monotonic()

    def _line_of(self, event: Event) -> str | None:
        """Return the line for an event of a whole stage or entry."""
        match event:
            case StageBegins(state="finished"):
                return f"stage {event.stage}: finished before, its files are as they were"
            case StageBegins():
                resumed = f", from step {event.step}" if event.state == "stopped" else ""
                return f"stage {event.stage}{', beside the others' * event.beside}{resumed}"
            case EntryBuilt(kind="combine"):
                details = f"; {event.told}" if self.is_verbose else ""
                return f"{event.entry}: combined in {duration(event.seconds)}{details}"
            case EntryBuilt(kind="import") if event.entry != START:
                return f"{event.entry}: imported in {duration(event.seconds)}"
            case EntryBuilt(kind="stage"):
                return f"stage {event.entry}: trained in {duration(event.seconds)}"
            case ForgettingHeld():
                return event.told
            case AlreadyFinished():
                return f"{event.run} was finished after step {event.step}: nothing left to do"
        return None

    def _read(self, what: str, detail: str, share: float, is_first: bool = False) -> None:
        """Show progress outside training, a bar or a line every `OFTEN` seconds; share in 0…1."""
        if what not in self.splits:
            self.splits[what] = self.reading.add_task(what, total=1.0, detail=detail)
            self.reading.start()
        self.reading.update(self.splits[what], completed=share, detail=detail)
        is_late = share < 1 and time.monotonic() - self.last_line >= OFTEN
        if not self.console.is_terminal and (is_first or is_late):
            self.last_line = time.monotonic()
            self._print(f"{what}: {detail}")

    def _plan(self, event: Planned) -> None:
        """Print the rows and steps of a stage, and start its bar."""
        # forget losses, seconds and bars of the stage before
        self.loss: float | None = None
        self.speed: float | None = None
        self.seconds: deque[float] = deque(maxlen=_RECENT)
        self.evaluation_seconds: deque[float] = deque(maxlen=_RECENT)
        self.splits.clear()
        for bar in (self.bar, self.reading):
            bar.stop()
            for task in bar.task_ids:
                bar.remove_task(task)
        self.log_every = event.log_every
        self.total, self.evaluations = event.num_steps, event.evaluations
        self.num_links, self.work_after = len(event.lengths), event.work_after
        lengths = self._lengths(event.lengths)
        resumed = f", resuming after step {event.step}" if event.step else ""
        rows = f"{event.rows} training row{'s' * (event.rows != 1)}"
        estimate = ""
        if event.estimate is not None and not event.step:
            estimate = f", about {duration(event.estimate)} in all at the speed of the stage before"
        self._print(f"{rows}, {event.num_steps} steps{lengths}{resumed}{estimate}")
        for split, counts in event.data.items():
            for line in _lines_of_split(counts):
                self._print(f"{split}: {line}")
        self.last_line = time.monotonic()
        self.task = self.bar.add_task(
            "train",
            total=event.num_steps,
            completed=event.step,
            link=self._link(0),
            loss="–",
            rate="",
            speed=0.0,
            left="",
        )
        self.bar.start()

    def _lengths(self, lengths: Sequence[int]) -> str:
        """Return the steps of each link, if there are several or the output is verbose."""
        steps = " + ".join(map(str, lengths)) or "no link"
        return f" ({steps})" if self.is_verbose or len(lengths) != 1 else ""

    def _link(self, link: int) -> str:
        """Return the number of the link, if there are several or the output is verbose."""
        return f"link {link}: " if self.is_verbose or self.num_links > 1 else ""

    def _step(self, event: StepDone) -> None:
        """Update the bar, or print a line if one is due."""
        self.seconds.append(event.seconds)
        self.loss = _smoothed(self.loss, event.loss)
        self.speed = _smoothed(self.speed, event.tokens / max(event.seconds, 1e-9))
        left = self._left(event.step)
        link = self._link(event.link)
        rate = f", lr {event.learning_rate:.1e}" if self.is_verbose else ""
        self.bar.update(
            self.task,
            completed=event.step,
            link=link,
            loss=f"{self.loss:.4f}",
            rate=rate,
            speed=self.speed,
            left=left,
        )
        if event.step >= self.total:
            self.bar.stop()
        every = self.log_every or math.ceil(self.total / _LINES)
        is_late = self.log_every is None and time.monotonic() - self.last_line >= _SILENCE
        if not self.console.is_terminal and (is_late or event.step % every == 0):
            self.last_line = time.monotonic()
            self._print(
                f"step {event.step:>5}  {link}loss {self.loss:.4f} (smoothed){rate}, "
                f"{self.speed:,.0f} tokens/s" + (f", {left}" if left else "")
            )

    def _left(self, step: int) -> str:
        """Return the estimated time of the remaining work, "" after few steps."""
        if step >= self.total or len(self.seconds) < min(_ENOUGH, self.total):
            return ""
        seconds = median(self.seconds) * (self.total - step) + self.work_after / (self.speed or 1.0)
        if self.evaluation_seconds:
            remaining = len(self.evaluations) - bisect_left(self.evaluations, step)
            seconds += median(self.evaluation_seconds) * remaining
        return f"{duration(max(seconds, 1))} left"

    def _evaluated(self, event: Evaluated) -> None:
        """Print the validation scores, and when they were measured."""
        self.evaluation_seconds.append(time.monotonic() - self.last_event)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
        end = f"after {self._link(event.link)}" if self._link(0) else "after training: "
        places = {"start": "before training: ", "knot": end}
        place = places.get(event.where, self._link(event.link))
        self._print(f"step {event.step:>5}  {place}validation {scores}")


def _lines_of_split(counts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each notable count of a split's rows (`Splits.report`)."""
    if "recognised" in counts:
        yield f"rows recognised as {counts['recognised']} (data.format)"
    if "held_out" in counts:
        yield f"{counts['held_out']:,} held out for validation (data.validation)"
    if "left_out" in counts:
        yield f"{counts['left_out']:,} left out: validation rows of earlier stages"
    if "seen" in counts:
        yield f"{counts['seen']:,} left out: trained on by earlier stages (data.new_rows_only)"
    if "replayed" in counts:
        yield f"{counts['replayed']:,} rows of earlier stages to read again (data.replay)"
    if "rows_split" in counts:
        blocks = sum(counts.get(key, 0) for key in ("examples", "held_out", "left_out", "seen"))
        yield (
            f"{counts['rows_split']:,} of {counts['rows']:,} texts were longer than the context or "
            f"data.max_length: {blocks:,} blocks, no token lost"
        )


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds, with hours if there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.9 * before + 0.1 * value
