"""One chain over several stages: what has ended is verified, what is new is trained.

A stage is an ordinary run that begins on the state that the stage before it ended in. So what
holds for a run holds inside a stage: kills, resume to the same bits, the best point, early stop.
The same call again goes on where the last one was stopped, and does nothing where all is done.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from chainlora.config.loading import set_key
from chainlora.config.stages import (
    Stage,
    check_name,
    is_run,
    make_stage,
    not_inherited,
    split_address,
    stage_folder,
    what_stages_share,
)
from chainlora.errors import RunError, StoppedError
from chainlora.evaluation.stages import stage_matrix
from chainlora.evaluation.strengths import guard
from chainlora.models.finding import from_above
from chainlora.runs.loading_start import load_start
from chainlora.runs.manifest import BASE, START
from chainlora.runs.reading import RunReader
from chainlora.runs.resuming import not_named
from chainlora.runs.stages import (
    alone_in,
    end_stage,
    folder_of,
    need_whole,
    open_run,
    place_of,
    read_stages,
    reader_of,
)
from chainlora.runs.start import NOTHING, Start, next_id_after
from chainlora.training.events import Listener, StageBegins, StageGuarded
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import train
from chainlora.training.processes import PATIENCE, is_first_launched, num_launched
from chainlora.training.result import TrainResult
from chainlora.training.survey import (
    StageState,
    ended_stages,
    naming,
    need_model,
    need_name,
    need_no_other,
    need_rows,
    run_of,
    survey,
    what_is_below,
)

logger = logging.getLogger(__name__)


def train_stages(
    stages: Sequence[Stage],
    *,
    listener: Listener | None = None,
    change: Collection[str] = (),
    matrix: bool = True,
) -> list[TrainResult | None]:
    """Train what is new of a chain's stages; return a result for each, None of what had ended.

    `change` names keys that the resume of a stopped stage may change
    (`runs.resuming.CHANGEABLE`). With `matrix`, the rows that stages kept are scored in the states
    where they were not yet (`evaluation.stages`).

    Raises RunError where a stage that has ended is another one now, and what `train` raises.
    """
    tell = listener or (lambda event: None)
    found = survey(stages, change)
    if is_first_launched():
        need_model(stages, found)
    results: list[TrainResult | None] = []
    for stage, where in zip(stages, found, strict=True):
        tell(StageBegins(where.step, stage.name, where.state))
        if where.state in ("finished", "pruned"):
            results.append(None)
        else:
            results.append(_train(stage, stages, where, tell, change))
            _wait_for_all()
    if matrix and is_first_launched():
        _score(run_of(stages))
    _wait_for_all()
    return results


def extension(
    address: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return the stages of a run with one more, which `section` and `overrides` describe.

    What they leave open is as in the stage before: not its rows, and neither the number of its
    links nor their lengths; a warning names what it had set and they do not. With `output` it is a
    fork: that run alone, which begins on the state that `address` names, whose files stay as they
    are.

    Raises:
        ConfigError: a stage without a name, or with keys that a stage cannot have.
        RunError: a stage that is not the last, and no `output`.
    """
    run, named = split_address(address)
    if not RunReader(run).manifest().has_run:
        raise RunError(
            "a stage is added to a run",
            f"a saved chain, {run}",
            f"begin a run on it, by start: {run} in its config",
        )
    own = {key: value for key, value in section.items() if key != "output"}
    for key, value in overrides:
        set_key(own, key, value)
    output = own.pop("output", section.get("output"))
    plugins = own.pop("plugins", None)
    if output is None:
        need_whole(run)
    name = check_name(own.get("name"))
    found = read_stages(run)
    before = found.names
    if output is None and name in before:
        before = before[: place_of(found, name, run)]
    if not before:
        raise RunError("an extension must come after a stage", f"{name!r}, the first", "rename it")
    goes_on = [each for each in before if each in found.here][-1:]
    last = (goes_on or before)[-1] if named is None else found.names[place_of(found, named, run)]
    if output is None and (named in (START, BASE) or last not in (before[-1], *goes_on)):
        raise RunError(
            f"a run goes on at its last stage, {(goes_on or before)[-1]} (got {address}); give "
            "--output for a fork that begins there"
        )
    is_new = output is None and name not in found.names
    ends = [reader_of(each).manifest().state for each in (run, address)]
    if is_new and ends[0] != ends[1]:
        raise RunError(
            "a run goes on as `mix` has made it",
            f"{address}, which is the stage as it was trained",
            f"name {run}, or give --output for a fork that begins there",
        )
    folders = [folder_of(run, found, place) for place in range(len(before))]
    stages = [
        Stage(each, RunReader(folder).config().model_copy(update={"output": str(folder)}))
        for each, folder in zip(before, folders, strict=True)
    ]
    below = stages[before.index(last)].config
    begun = Path(expanduser(output)) if output is not None else stage_folder(run, name)
    if (left_out := not_inherited(below, own)) and not is_run(begun):
        logger.warning("stage %s does not inherit %s from %s", name, ", ".join(left_out), last)
    if plugins is None and below.plugins:
        raise RunError(not_named(f"extend {address}", below.plugins) + ", or --plugins [] without")
    shared = what_stages_share(below) | {"plugins": plugins or ()}
    if output is not None:
        base = from_above(shared["model"], run)
        tree = shared | {"model": base, "start": str(address), "output": str(output)}
        return [make_stage(tree, own, 0)]
    tree = shared | {"output": str(run)}
    new = make_stage(tree, own, len(stages))
    trusted = {"plugins": new.config.plugins}  # and not those that the run records
    earlier = [replace(each, config=each.config.model_copy(update=trusted)) for each in stages]
    return [*earlier, new]


def _train(
    stage: Stage,
    stages: Sequence[Stage],
    where: StageState,
    tell: Listener,
    change: Collection[str],
) -> TrainResult:
    run, is_first = run_of(stages), stage is stages[0]
    with alone_in(run) if is_first_launched() and not is_first else nullcontext():
        if not is_first:  # another process may have ended one in the meantime, or begun one
            ended_stages(run, stages)
            need_no_other(stage, stages)
        with naming(stage):
            start = NOTHING
            if where.state == "new":
                start = _start(stage, run, is_first)
                below = what_is_below(start, stage.config)
                need_name(stage, below)
                need_rows(stage, below)
            result = train(stage.config, resume=True, listener=tell, change=change, start=start)
        if is_first_launched():
            _end(stage, run, is_first, tell)
    return result


def _end(stage: Stage, run: Path, is_first: bool, tell: Listener) -> None:
    """Name a stage as ended, at full strength or, with a tolerance, at what earlier ones bear."""
    folder = Path(stage.config.output or "")
    is_judged = stage.tolerance is not None and len(RunReader(folder).manifest().columns) > 1
    strength = 1.0
    if stage.tolerance is not None and is_judged:
        strength, gains = guard(folder, stage.tolerance, progress=_stop_if_requested)
        means = {name: found.mean for name, found in gains.items()}
        tell(StageGuarded(0, stage.name, strength, means))
    if is_judged or not is_first:
        with alone_in(run) if is_first else nullcontext():
            end_stage(run, stage.name, strength)


def _wait_for_all() -> None:
    """Let all processes come here: the first one writes what the others read next."""
    if num_launched() > 1:
        cpu = not torch.accelerator.is_available()
        PartialState(cpu=cpu, timeout=PATIENCE).wait_for_everyone()


def _score(run: Path) -> None:
    """Score all stages in all states, where there are several and they kept rows."""
    manifest = open_run(run).manifest()
    if len(manifest.columns) > 1 and manifest.kept:
        stage_matrix(run, progress=_stop_if_requested)


def _stop_if_requested(what: str, done: int, rows: int) -> None:
    """Raise StoppedError while stages are scored, which the same command then does, if asked to.

    Several processes must stop alike, so they finish what they have begun.
    """
    number = stop_requested()
    if number is not None and num_launched() == 1:
        got = f"{signal.Signals(number).name} while it was scored, {what}"
        raise StoppedError(f"the run stopped (got {got}); the same command goes on", number)


def _start(stage: Stage, run: Path, is_first: bool) -> Start:
    """Return the state that a new stage begins on."""
    address = stage.config.start if is_first else str(run)
    if address is None:
        return Start(stage.name)
    start = load_start(address, stage.name)
    if not is_first:  # ids of stages that were pruned are not used again
        found = read_stages(run)
        last = RunReader(folder_of(run, found, len(found.names) - 1))
        start = replace(start, next_id=next_id_after(last))
    return start
