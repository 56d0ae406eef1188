"""`chainlora.train` and `chainlora.extend`: the loop as a script or a notebook calls it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from chainlora.chain.showing import Shown
from chainlora.config.reading import make_config, read_config
from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage, check_alone, has_stages, make_stages
from chainlora.runs.loading_start import with_start
from chainlora.training.events import Event, Listener
from chainlora.training.loop import train as run_training
from chainlora.training.processes import is_first_launched
from chainlora.training.progress import progress_listener
from chainlora.training.result import TrainResult, result_of
from chainlora.training.stages import extension, train_stages


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    change: Collection[str] = (),
    progress: bool | None = None,
) -> TrainResult:
    """Run a config from data to result and return what ``result.json`` holds.

    Args:
        config: a config, the path of a YAML file, or a mapping of its keys. One with `stages`
            trains those that are new, and gives the result of the last one.
        resume: resume a run in `output` that was stopped or killed, to the same bits, and return
            the result of one that has ended; where no run is, begin. Without, a run in `output` is
            refused. Stages always resume.
        listener: gets every event (`training.events`): `Planned` before the first step, and before
            it `RowsEncoded` while a large data set is tokenised.
        change: keys that a resume may change (`runs.resuming.CHANGEABLE`).
        progress: whether to show it on stderr: a bar on a terminal, lines in a notebook or a log
            file. None: unless there is a listener.

    Everything that can be refused is refused before training. Raises ChainLoRAError subclasses.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    if isinstance(config, RunConfig) and has_stages(dict(config)):
        config = config.model_dump(mode="json")
    if isinstance(config, Mapping) and has_stages(config):
        stages = make_stages(with_start(config))
        return _of_stages(stages, listener, change, progress)
    checked = check_alone(config if isinstance(config, RunConfig) else make_config(config))
    with _shown(listener, progress) as tell:
        found = run_training(checked, resume=resume, listener=tell, change=change)
    return cast(TrainResult, Shown(found))


def extend(
    run: str | Path,
    stage: Mapping[str, Any],
    *,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train one more stage on top of a run, and return what its ``result.json`` holds.

    `stage` has a `name`, and the sections data, chain and train; what it leaves open is as in the
    stage before, but for rows, ranks, lengths and how the end is chosen: a warning names those keys
    of the stage before. With `output` it becomes a fork that begins on
    `run`, which may then be ``RUN@STAGE``. The same call again goes on where it was stopped.
    """
    return _of_stages(extension(run, stage), listener, (), progress)


def _of_stages(
    stages: Sequence[Stage],
    listener: Listener | None,
    change: Collection[str],
    progress: bool | None,
) -> TrainResult:
    """Train what is new, and return the last stage's result."""
    with _shown(listener, progress) as tell:
        last = train_stages(stages, listener=tell, change=change)[-1]
    found = last or result_of(stages[-1].config, stages[-1].name)
    return cast(TrainResult, Shown(found))


@contextmanager
def _shown(listener: Listener | None, progress: bool | None) -> Iterator[Listener]:
    """Give what tells the listener, and shows progress where it is wanted."""
    is_shown = (listener is None) if progress is None else progress
    is_shown &= is_first_launched()
    with progress_listener() if is_shown else nullcontext(lambda event: None) as show:

        def tell(event: Event) -> None:
            show(event)
            if listener is not None:
                listener(event)

        yield tell
