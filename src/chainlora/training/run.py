"""`Run`: the objects of a stage while it is trained, and how its events and points are saved."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.splits import Splits
from chainlora.engine.engine import Engine
from chainlora.errors import StoppedError, TrainingError
from chainlora.evaluation.evaluate import Evaluation
from chainlora.knots.driver import Knots
from chainlora.runs.draft import Progress
from chainlora.runs.work import Work
from chainlora.training.batches import Batches
from chainlora.training.events import Event, Listener
from chainlora.training.objectives import Objective
from chainlora.training.optimizers import state_tensors
from chainlora.training.processes import Processes


@dataclass
class Run:
    """A stage in training. As a context manager, it closes what it holds."""

    config: RunConfig
    batches: Batches
    splits: Splits
    objective: Objective
    chain: Chain
    engine: Engine
    tokenizer: Any
    accelerator: Accelerator
    processes: Processes
    work: Work | None  # the stage on disk; None without an output
    progress: Progress
    listener: Listener
    stage: str  # its name
    first: int  # number of links below the stage
    knots: Knots = field(init=False)  # set by `training.deciding.decide`
    best_link: Link | None = None  # the best point, if it lies inside a link
    last_scored: Evaluation | None = None  # of the current weights; None after a step
    began: float = field(default_factory=time.monotonic)

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    def record(self, event: Event) -> None:
        """Send an event to ``metrics.jsonl``, the listener and the trackers."""
        if self.work is not None:
            self.work.record(event.record(), self.progress)
        self.listener(event)
        if self.train.trackers:
            values = {k: v for k, v in event.record().items() if isinstance(v, int | float)}
            del values["step"]
            named = {f"{event.name}/{key}": value for key, value in values.items()}
            self.accelerator.log(named, step=event.step)

    def stop_if_requested(self) -> None:
        """Raise StoppedError if a signal asked to stop. The caller has saved the state."""
        number = self.processes.stop_requested()
        if number is None:
            return
        remedy = "repeat the command to resume it" if self.work else "it cannot be resumed"
        raise StoppedError(
            f"the run stopped after step {self.progress.step} of {self.batches.num_steps} (got "
            f"{signal.Signals(number).name}); {remedy}",
            number,
        )

    def save_point(self) -> None:
        """Save the tied links as the point to resume from."""
        self.progress.link = self.knots.index
        self.count_seconds()
        if self.work is not None:
            self.work.save_point(self.progress, self.knots.numbers)

    def save_checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        """Save the live link and the optimizer as the point to resume from."""
        if self.work is not None and self.chain.live is not None:
            self.count_seconds()
            self.progress.soft_knots = self.chain.live_soft_knots
            self.work.save_checkpoint(
                self.chain.live_state(), state_tensors(optimizer), self.progress
            )

    @property
    def is_inside_link(self) -> bool:
        """Say whether a stopped run resumes inside a link, which must still be tied."""
        return self.work is not None and self.work.draft.has_checkpoint(self.progress)

    def count_seconds(self) -> None:
        """Add the seconds since the last count to the progress."""
        now = time.monotonic()
        self.progress.seconds += now - self.began
        self.began = now

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End threads and trackers, unlock the stage, restore the model's own forward functions.

        A stage that is refused before its first step is removed.
        """
        is_refused = error is not None and not isinstance(error, TrainingError | KeyboardInterrupt)
        try:
            self.engine.close()
        finally:
            if self.work is not None:
                self.work.close(undo=is_refused and self.progress.step == 0)
            if self.train.trackers:
                self.accelerator.end_training()
