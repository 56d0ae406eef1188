"""A run while it runs: all that its loop holds, and how it is recorded."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.data.splits import Splits
from chainlora.engine.engine import Engine
from chainlora.errors import StoppedError, TrainingError
from chainlora.evaluation.evaluate import Evaluation
from chainlora.runs.directory import Progress, RunDirectory
from chainlora.training.events import Event, Listener
from chainlora.training.knots import KnotPolicy
from chainlora.training.objectives import Objective
from chainlora.training.plan import Plan
from chainlora.training.processes import Processes


class Clock:
    """Seconds that a run has taken, those before it was resumed included."""

    def __init__(self, before: float) -> None:
        self._began = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._began


@dataclass
class Run:
    """All that a run holds while it runs; as a context manager, it gives everything back."""

    config: RunConfig
    plan: Plan
    splits: Splits
    objective: Objective
    policy: KnotPolicy
    chain: Chain
    engine: Engine
    tokenizer: Any
    accelerator: Accelerator
    processes: Processes
    directory: RunDirectory | None
    progress: Progress
    base: dict[str, Any]
    listener: Listener
    clock: Clock
    best_link: Link | None = None  # the best point, where it lies inside a link
    last_scored: Evaluation | None = None  # of the model as it is; None once it may have changed
    accepted: Evaluation | None = None  # of the links that are kept; `accept_links: better` alone
    kept_moments: dict[str, Tensor] | None = field(default=None, repr=False)  # over a knot: ReLoRA

    @property
    def train(self) -> TrainConfig:
        """The config's `train` section."""
        return self.config.train

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.accelerator.device

    @property
    def lengths(self) -> list[int]:
        """Steps of each link: of those that ended, as they were; of the others, as planned.

        A policy may end a link early. The last link then makes up for it, so that the whole chain
        has the steps that were planned.
        """
        planned, ended = self.plan.lengths, self.progress.link
        done = self.progress.lengths or list(planned[:ended])  # version 0.1 recorded none
        rest = list(planned[ended:])
        if rest:
            rest[-1] = sum(planned) - sum(done) - sum(rest[:-1])
        return done + rest

    def first_step(self, link: int) -> int:
        """Return the number of the link's first step."""
        return sum(self.lengths[:link])

    def record(self, event: Event) -> None:
        """Send an event to ``metrics.jsonl``, the listener and the trackers."""
        if self.directory is not None:
            self.directory.record(event.record(), self.progress)
        self.listener(event)
        if self.train.trackers:
            values = {k: v for k, v in event.record().items() if isinstance(v, int | float)}
            del values["step"]
            named = {f"{event.name}/{key}": value for key, value in values.items()}
            self.accelerator.log(named, step=event.step)

    @property
    def is_resumable(self) -> bool:
        """Say whether the run can be resumed: whether what it has learned is on disk."""
        return self.directory is not None and self.config.chain.tune == "lora"

    def stop_if_requested(self) -> None:
        """Raise StoppedError if a signal asked to stop. The caller has saved the state."""
        number = self.processes.stop_requested()
        if number is None:
            return
        remedy = "--resume continues from there" if self.is_resumable else "it cannot be resumed"
        raise StoppedError(
            f"the run stopped after step {self.progress.step} of {self.plan.num_steps} (got "
            f"{signal.Signals(number).name}); {remedy}",
            number,
        )

    def write_manifest(self) -> None:
        """Write ``chain.json`` for the links there are."""
        if self.directory is not None:
            self.progress.seconds = self.clock.seconds
            self.directory.write_manifest(self.base, self.config, self.chain.links, self.progress)

    def close(self, *, undo: bool = False) -> None:
        """End threads and trackers, unlock the directory, give the model its own forwards back.

        With `undo`, a directory in which nothing was learned yet is removed.
        """
        try:
            self.engine.close()
        finally:
            if self.directory is not None:
                self.directory.close(undo=undo)
            if self.train.trackers:
                self.accelerator.end_training()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_refused = error is not None and not isinstance(error, TrainingError | KeyboardInterrupt)
        self.close(undo=is_refused and self.progress.step == 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as ``{"train.lr": "0.001", …}``, as trackers take it."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return flat
