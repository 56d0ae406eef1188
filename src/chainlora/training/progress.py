"""What a person sees while a run trains: a progress bar on a terminal, lines everywhere else."""

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
from chainlora.runs.history import START
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

_LINES = 10  # of steps in a run, where nobody says how many
_RECENT, _ENOUGH = 25, 5  # steps whose median tells the time left: the first ones are slow
_SILENCE = 60.0  # seconds after which a line is due all the same
OFTEN = 10.0  # seconds between lines where nothing else is said


@contextmanager
def progress_listener(is_verbose: bool = False) -> Iterator[Listener]:
    """Give a listener for `train` that shows loss, tokens/s and time left on stderr.

    On a terminal that is a bar, which goes when the context ends, however it ends. In a log file or
    a notebook it is a line every `train.log_every` steps. `is_verbose` adds rates, knots, and how
    far combinations are from their parts.
    """
    listener = _Listener(is_verbose)
    try:
        yield listener
    finally:
        listener.reading.stop()
        listener.bar.stop()


class Terminal(Console):
    """A console of rich that writes control characters in texts as escapes, as `cli` prints."""

    def __init__(self, *, stderr: bool = False, **keys: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(file=getattr(stream, "unescaped", None), stderr=stderr, **keys)

    def render_str(self, text: str, **keys: Any) -> Text:
        return super().render_str(printable(text), **keys)


def console_on_stderr() -> Console:
    """Return the console for progress, on which bars are drawn only if stderr is a terminal.

    A notebook is none, though it sets FORCE_COLOR: rich would need widgets there, or would print
    each frame of a bar below the last one.
    """
    isatty = getattr(sys.stderr, "isatty", bool)  # a daemon has no stderr, others put a log there
    return Terminal(stderr=True, force_jupyter=False, force_terminal=isatty())


def console_of_bars(console: Console) -> Console:
    """Return the console that bars are drawn on: a silent one where they are disabled, for which
    rich before 14.3 writes an empty line."""
    return console if console.is_terminal else Console(quiet=True)


class _Listener:
    def __init__(self, is_verbose: bool) -> None:
        self.is_verbose, self.num_links = is_verbose, 1
        self.console = console_on_stderr()
        self.log_every: int | None = None
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
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            transient=True,
            **bars,
        )
        self.splits: dict[str, Any] = {}
        self.task: Any = None
        self.total = 0
        self.loss: float | None = None
        self.speed: float | None = None
        self.seconds: deque[float] = deque(maxlen=_RECENT)
        self.evaluations: Sequence[int] = ()
        self.evaluation_seconds: deque[float] = deque(maxlen=_RECENT)
        self.heard = self.said = time.monotonic()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        match event:
            case RowsEncoded():
                self._read(f"tokenising {event.split}", f"{event.rows:,} rows", event.share)
            case ReferenceScored():
                self._read(f"scoring {event.split}", f"{event.rows:,} rows", event.share)
            case KeptRowsRead():
                whose = f"{event.what}, " if event.what else ""
                self._read(event.doing, f"{whose}{event.rows:,} rows", event.share)
            case LayerSolved():
                told = f"layer {event.layer or 1} of {event.layers}"
                share = event.layer / event.layers
                self._read(f"combining {event.parts}", told, share, is_first=event.layer == 0)
            case Planned():
                self._plan(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case StageBegins(state="finished"):
                self._say(f"stage {event.stage}: finished before, its files are as they were")
            case StageBegins():
                again = f", from step {event.step}" if event.state == "stopped" else ""
                where = ", beside the others" * event.beside
                self._say(f"stage {event.stage}{where}{again}")
            case EntryBuilt(kind="combine"):
                took = _duration(event.seconds)
                told = f"; {event.told}" if self.is_verbose else ""
                self._say(f"{event.entry}: combined in {took}{told}")
            case EntryBuilt(kind="import") if event.entry != START:
                self._say(f"{event.entry}: imported in {_duration(event.seconds)}")
            case EntryBuilt(kind="stage"):
                self._say(f"stage {event.entry}: trained in {_duration(event.seconds)}")
            case ForgettingHeld():
                self._say(event.told)
            case AlreadyFinished():
                self._say(f"{event.run} was finished after step {event.step}: nothing left to do")
            case KnotTied() if self.is_verbose:
                self._say(
                    f"step {event.step:>5}  link {event.link} tied "
                    f"(rounding changed the function by {event.function_change:.1e})"
                )
        self.heard = time.monotonic()

    def _read(self, what: str, told: str, share: float, is_first: bool = False) -> None:
        """Show what is done between trainings: by a bar, else by a line now and then."""
        if what not in self.splits:
            self.splits[what] = self.reading.add_task(what, total=1.0, told=told)
            self.reading.start()
        self.reading.update(self.splits[what], completed=share, told=told)
        is_late = share < 1 and time.monotonic() - self.said >= OFTEN
        if not self.console.is_terminal and (is_first or is_late):
            self.said = time.monotonic()
            self._say(f"{what}: {told}")

    def _plan(self, event: Planned) -> None:
        # losses, seconds and bars of the stage before say nothing of this one
        self.loss = self.speed = None
        self.seconds.clear()
        self.evaluation_seconds.clear()
        self.splits.clear()
        for bar in (self.bar, self.reading):
            bar.stop()
            for task in bar.task_ids:
                bar.remove_task(task)
        self.log_every = event.log_every
        self.total, self.evaluations = event.num_steps, event.evaluations
        self.num_links = len(event.lengths)
        lengths = self._lengths(event.lengths)
        resumed = f", resuming after step {event.step}" if event.step else ""
        rows = f"{event.rows} training row{'s' * (event.rows != 1)}"
        about = ""
        if event.estimate is not None and not event.step:
            about = f", about {_duration(event.estimate)} at the speed of the stage before"
        self._say(f"{rows}, {event.num_steps} steps{lengths}{resumed}{about}")
        for split, found in event.data.items():
            for line in _what_became_of(found):
                self._say(f"{split}: {line}")
        self.said = time.monotonic()
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
        """Return the steps of each link, where there are several, or somebody wants to know."""
        each = " + ".join(map(str, lengths)) or "no link"
        return f" ({each})" if self.is_verbose or len(lengths) != 1 else ""

    def _link(self, link: int) -> str:
        """Return which link is trained, where there are several."""
        return f"link {link}: " if self.is_verbose or self.num_links > 1 else ""

    def _step(self, event: StepDone) -> None:
        self.seconds.append(event.seconds)
        left = self._left(event.step)
        self.loss = _smoothed(self.loss, event.loss)
        self.speed = _smoothed(self.speed, event.tokens / max(event.seconds, 1e-9))
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
        is_late = self.log_every is None and time.monotonic() - self.said >= _SILENCE
        if not self.console.is_terminal and (is_late or event.step % every == 0):
            self.said = time.monotonic()
            self._say(
                f"step {event.step:>5}  {link}loss {self.loss:.4f} (smoothed){rate}, "
                f"{self.speed:,.0f} tokens/s" + (f", {left}" if left else "")
            )

    def _left(self, step: int) -> str:
        """Return how long steps and evaluations that are left take, once enough were seen."""
        if len(self.seconds) < min(_ENOUGH, self.total):
            return ""
        seconds = median(self.seconds) * (self.total - step)
        if self.evaluation_seconds:
            due = len(self.evaluations) - bisect_left(self.evaluations, step)
            seconds += median(self.evaluation_seconds) * due
        return f"{_duration(seconds)} left"

    def _evaluated(self, event: Evaluated) -> None:
        self.evaluation_seconds.append(time.monotonic() - self.heard)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
        end = f"after {self._link(event.link)}" if self._link(0) else "after training: "
        places = {"start": "before training: ", "knot": end}
        place = places.get(event.where, self._link(event.link))
        self._say(f"step {event.step:>5}  {place}validation {scores}")


def _what_became_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a person should know of the rows of a split."""
    if "recognised" in found:
        yield f"rows recognised as {found['recognised']} (data.format)"
    if "held_out" in found:
        yield f"{found['held_out']:,} held out for validation (data.validation)"
    if "left_out" in found:
        yield f"{found['left_out']:,} left out: validation rows of earlier stages"
    if "seen" in found:
        yield f"{found['seen']:,} left out: trained on by earlier stages (data.new_rows_only)"
    if "replayed" in found:
        yield f"{found['replayed']:,} rows of earlier stages to read again (data.replay)"
    if "rows_split" in found:
        blocks = sum(found.get(each, 0) for each in ("examples", "held_out", "left_out", "seen"))
        yield (
            f"{found['rows_split']:,} of {found['rows']:,} texts were longer than the context or "
            f"data.max_length: {blocks:,} blocks, no token lost"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.9 * before + 0.1 * value
