"""`chainlora.train`: the loop as a script or a notebook calls it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from chainlora.config.loading import load_config, make_config
from chainlora.config.schema import RunConfig
from chainlora.training.events import Event, Listener
from chainlora.training.loop import train as run_training
from chainlora.training.processes import is_first_launched
from chainlora.training.progress import progress_listener
from chainlora.training.result import TrainResult


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
        config: a config, the path of a YAML file, or a mapping of its keys.
        resume: continue a run that was stopped or killed, to the same bits.
        listener: gets every event (`training.events`): `Planned` before the first step, and before
            it `RowsEncoded` while a large data set is tokenised.
        change: keys that a resume may change (`runs.resuming.CHANGEABLE`).
        progress: whether to show it on stderr: a bar on a terminal, lines in a notebook or a log
            file. None: unless there is a listener.

    Everything that can be refused is refused before training. Raises ChainLoRAError subclasses.
    """
    checked = _checked(config)
    is_shown = (listener is None) if progress is None else progress
    shown = (
        progress_listener(checked.train.log_every)
        if is_shown and is_first_launched()
        else nullcontext(_ignore)
    )
    with shown as show:

        def tell(event: Event) -> None:
            show(event)
            if listener is not None:
                listener(event)

        return run_training(checked, resume=resume, listener=tell, change=change)


def _checked(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    return load_config(config) if isinstance(config, str | Path) else make_config(config)


def _ignore(event: Event) -> None:
    """Take an event and show nothing."""
