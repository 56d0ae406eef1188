"""One chain over several stages: what has ended is verified, what is new is trained.

A stage is an ordinary run that begins on the state that the stage before it ended in. So what
holds for a run holds inside a stage: kills, resume to the same bits, the best point, early stop.
The same call again goes on where the last one was stopped, and does nothing where all is done.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn

from chainlora.chain.adapters import check_targets, inside, matched_modules
from chainlora.chain.checks import check_apart, check_strengths
from chainlora.chain.link import Link
from chainlora.config.loading import set_key
from chainlora.config.schema import LinkConfig
from chainlora.config.stages import (
    Stage,
    check_name,
    make_stage,
    make_stages,
    split_address,
    what_stages_share,
)
from chainlora.data.division import can_read_again
from chainlora.data.kept import Kept
from chainlora.data.splits import check_files, learned_by, length_limit
from chainlora.errors import ChainError, ChainLoRAError, RunError, StoppedError
from chainlora.evaluation.stages import stage_matrix
from chainlora.evaluation.strengths import guard
from chainlora.knots.driver import check_policy
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.loading_start import IMPORTED, load_start
from chainlora.runs.reading import RunReader
from chainlora.runs.resuming import changes
from chainlora.runs.stages import (
    STAGES,
    alone_in,
    end_stage,
    first_is_open,
    folder_of,
    half_trained,
    open_run,
    place_of,
    read_stages,
)
from chainlora.runs.start import NOTHING, Start, next_id_after
from chainlora.training.events import Listener, StageBegins, StageGuarded
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import train
from chainlora.training.optimizers import check_optimizer
from chainlora.training.processes import PATIENCE, is_first_launched, num_launched
from chainlora.training.result import TrainResult


@dataclass(frozen=True)
class StageState:
    """Where a stage is: `step` and `links` are those that a resume begins from."""

    name: str
    state: Literal["finished", "pruned", "stopped", "new"]
    step: int = 0


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
        _need_model(stages, found)
    results: list[TrainResult | None] = []
    for stage, where in zip(stages, found, strict=True):
        tell(StageBegins(where.step, stage.name, where.state))
        if where.state in ("finished", "pruned"):
            results.append(None)
        else:
            results.append(_train(stage, stages, where, tell, change))
            _wait_for_all()
    if matrix and is_first_launched():
        _score(_run_of(stages))
    _wait_for_all()
    return results


def survey(stages: Sequence[Stage], change: Collection[str] = ()) -> list[StageState]:
    """Say where each stage is, all files of those that have ended checked. Trains nothing.

    Raises RunError where the run holds other stages than these, or one of them with other contents,
    DataError where a new one has no rows.
    """
    run = _run_of(stages)
    if not (run / "chain.json").is_file() and not (run / STAGES).is_file():
        found = [_new(stage) for stage in stages]
    else:
        known, here = _known(run, stages), read_stages(run).here
        found = [
            StageState(stage.name, "pruned")
            if stage.name in known and stage.name not in here
            else _state_of(stage, stage.name in known and not first_is_open(run), change)
            for stage in stages
        ]
    below, links = _begun_on(stages)
    for stage, where in zip(stages, found, strict=True):
        if where.state in ("new", "stopped"):
            links += [Link(len(links), each, {}) for each in stage.config.chain.links()]
        if where.state == "new":
            _need_no_other(stage, stages)
            _need_name(stage, below)
            _need_rows(stage, below)
            _need_sum(stage, links)
        if where.state != "pruned":
            below[stage.name] = _kept_loss(stage, is_new=where.state == "new")
    return found


def _kept_loss(stage: Stage, *, is_new: bool) -> str | None:
    """Return what the rows are learned by that a stage keeps; None where it keeps none."""
    data = stage.config.data
    if is_new:
        return learned_by(data, stage.config.train.loss) if data.keep_rows else None
    kept = RunReader(stage.config.output or "").kept().get(stage.name)
    return None if kept is None else kept.loss


def _begun_on(stages: Sequence[Stage]) -> tuple[dict[str, str | None], list[Link]]:
    """Return the stages that a chain begins on, what the rows are learned by that they kept, and
    all links that are there, without their tensors."""
    first = stages[0].config
    reader = RunReader(first.output or "")
    if reader.exists:
        manifest = reader.manifest()
        below = _losses((e.stage for e in manifest.links[: manifest.first]), reader.kept())
        return below, [entry.outline() for entry in open_run(reader.path).manifest().loaded]
    if first.start is None:
        return {}, []
    start = load_start(first.start, stages[0].name)
    return _below(start), list(start.links)


def _below(start: Start) -> dict[str, str | None]:
    """Return the stages below one that begins there, and what their kept rows are learned by."""
    names = [IMPORTED] if start.adapter is not None else [entry.stage for entry in start.entries]
    return _losses(names, start.kept)


def _losses(names: Iterable[str], kept: Mapping[str, Kept]) -> dict[str, str | None]:
    return {name: kept[name].loss if name in kept else None for name in names}


def extension(
    address: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return the stages of a run with one more, which `section` and `overrides` describe.

    What they leave open is as in the stage before: not its rows, and neither the number of its
    links nor their lengths. With `output` it is a fork: that run alone, which begins on the state
    that `address` names, whose files stay as they are.

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
    name = check_name(own.get("name"))
    found = read_stages(run)
    before = found.names
    if output is None and name in before:
        before = before[: place_of(found, name, run)]
    if not before:
        raise RunError("an extension must come after a stage", f"{name!r}, the first", "rename it")
    goes_on = [each for each in before if each in found.here][-1:]
    last = (goes_on or before)[-1] if named is None else found.names[place_of(found, named, run)]
    if output is None and last not in (before[-1], *goes_on):
        raise RunError(
            f"a run goes on at its last stage, {(goes_on or before)[-1]} (got {address}); give "
            "--output for a fork that begins there"
        )
    folders = [folder_of(run, found, place) for place in range(len(before))]
    stages = [
        Stage(each, RunReader(folder).config().model_copy(update={"output": str(folder)}))
        for each, folder in zip(before, folders, strict=True)
    ]
    shared = what_stages_share(stages[before.index(last)].config)
    if output is not None:
        tree = shared | {"start": str(address), "output": str(output)}
        return make_stages(tree | {"stages": [own]})
    tree = shared | {"output": str(run)}
    return [*stages, make_stage(tree, own, len(stages))]


def _known(run: Path, stages: Sequence[Stage]) -> list[str]:
    """Return the stages that have ended. Raises RunError unless `stages` begins with them.

    Later ones that were pruned may be left out.
    """
    found, names = read_stages(run), [stage.name for stage in stages]
    kept = {found.names[0], *found.here, *names}
    known = [name for name in found.names if name in kept]
    for place, name in enumerate(known[: len(names)]):
        if names[place] != name:
            raise RunError(
                f"the stages of a run must be those that it has, in their order (got {names[place]}"
                f" for {name} in {run}); add new ones below, or choose another output"
            )
    return known


def _new(stage: Stage) -> StageState:
    """Refuse what the files of a stage tell, before hours of the stages before it."""
    with _named(stage):
        check_files(stage.config.data, stage.config.train.loss)
    return StageState(stage.name, "new")


def _need_model(stages: Sequence[Stage], found: Sequence[StageState]) -> None:
    """Refuse what the model or this machine cannot do, before hours of the stages before it.

    The first stage that is to be trained is not looked at: it is checked when it begins.
    """
    ended = sum(where.state in ("finished", "pruned") for where in found)
    later = stages[ended + 1 :]
    if not later:
        return
    model = load_skeleton(stages[0].config.model)
    has_one, cpu = torch.accelerator.is_available(), torch.device("cpu")
    device = (torch.accelerator.current_accelerator() if has_one else None) or cpu
    below = [
        link
        for stage, where in zip(stages[: ended + 1], found, strict=False)
        for link in (stage.config.chain.links() if where.state != "pruned" else [])
    ]
    for stage in later:
        with _named(stage):
            check_optimizer(stage.config, device)
            if stage.config.chain.knots is not None:
                check_policy(stage.config.chain.knots)
            length_limit(stage.config.data, context_length(model))
            for link in dict.fromkeys(stage.config.chain.links()):
                check_targets(model, link)
                _need_apart(model, below, link)
        below += stage.config.chain.links()


def _need_apart(model: nn.Module, below: Sequence[LinkConfig], link: LinkConfig) -> None:
    others = dict.fromkeys(below)
    adapted = {name for other in others for name in matched_modules(model, other)}
    whole = {name for other in others for name in inside(model, other.extra_modules)}
    check_apart(adapted, whole, model, link)


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Begin an error's message with the name of the stage."""
    try:
        yield
    except ChainLoRAError as error:
        error.args = (f"stage {stage.name!r}: {error}",)
        raise


def _need_no_other(stage: Stage, stages: Sequence[Stage]) -> None:
    """Refuse a new stage while another one is half trained, which would go on without it.

    One that comes before it in the config is trained first.
    """
    run = _run_of(stages)
    begun = half_trained(run, read_stages(run)) if (run / "chain.json").is_file() else []
    names = [each.name for each in stages[: stages.index(stage) + 1]]
    others = [path for path in begun if path.name not in names]
    if others:
        rule = "a stage can begin when no other is half trained"
        raise RunError(rule, others[0], "finish it, or delete that folder")


def _need_name(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse a name that a stage has which the chain begins on, before any is trained."""
    if stage.name in below:
        raise RunError(
            "a stage must have a name of its own",
            f"{stage.name!r}, which is there",
            "choose another",
        )


def _need_rows(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse what needs rows of earlier stages that are not there, before any is trained.

    Of what was made elsewhere nobody knows the rows, new or not.
    """
    data, without = stage.config.data, [name for name, loss in below.items() if loss is None]
    missing = {
        "train.accept_links": without if stage.tolerance is not None else [],
        "data.new_rows_only": [n for n in without if data.new_rows_only and n != IMPORTED],
        "data.replay": without if data.replay and len(without) == len(below) else [],
    }
    for key, names in missing.items():
        if names:
            raise RunError(
                f"`{key}` of stage {stage.name!r} needs rows that earlier stages kept",
                f"none of {', '.join(names)}",
                f"train those with data.keep_rows: true, or leave {key} out",
            )
    losses = {name: loss for name, loss in below.items() if loss is not None}
    own = learned_by(data, stage.config.train.loss)
    if data.replay and not any(can_read_again(loss, own) for loss in losses.values()):
        raise RunError(
            f"`data.replay` of stage {stage.name!r} needs earlier rows that are learned by {own}",
            ", ".join(f"{name}: {loss}" for name, loss in losses.items()) or "no earlier stage",
            "leave it out of that stage",
        )


def _need_sum(stage: Stage, links: Sequence[Link]) -> None:
    """Refuse a stage on links of a strength that it cannot be tuned on, before any is trained."""
    try:
        check_strengths(links)
    except ChainError as error:
        raise RunError(
            f"stage {stage.name!r} needs those below at a strength that it can be tuned on",
            error,
            "restore that one by `mix`, or prune it",
        ) from None


def _state_of(stage: Stage, has_ended: bool, change: Collection[str]) -> StageState:
    reader = RunReader(stage.config.output or "")
    if not has_ended and not reader.exists:
        return _new(stage)
    manifest = reader.verify()
    is_finished = has_ended and reader.is_finished(manifest)
    named = () if is_finished else change
    changes(reader.config(), stage.config, named, stage=stage.name, may_move=not is_finished)
    state: Literal["finished", "stopped"] = "finished" if is_finished else "stopped"
    return StageState(stage.name, state, manifest.position.step)


def _train(
    stage: Stage,
    stages: Sequence[Stage],
    where: StageState,
    tell: Listener,
    change: Collection[str],
) -> TrainResult:
    run, is_first = _run_of(stages), stage is stages[0]
    with alone_in(run) if is_first_launched() and not is_first else nullcontext():
        if not is_first:  # another process may have ended one in the meantime, or begun one
            _known(run, stages)
            _need_no_other(stage, stages)
        with _named(stage):
            start = NOTHING
            if where.state == "new":
                start = _start(stage, run, is_first)
                _need_name(stage, _below(start))
                _need_rows(stage, _below(start))
            resume = where.state == "stopped" or Path(stage.config.output or "").exists()
            result = train(stage.config, resume=resume, listener=tell, change=change, start=start)
        if is_first_launched():
            _end(stage, run, is_first, tell)
    return result


def _end(stage: Stage, run: Path, is_first: bool, tell: Listener) -> None:
    """Name a stage as ended, at full strength or, with a tolerance, at what earlier ones bear."""
    folder = Path(stage.config.output or "")
    is_judged = stage.tolerance is not None and len(RunReader(folder).manifest().stages) > 1
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
    if len(manifest.stages) > 1 and manifest.kept:
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


def _run_of(stages: Sequence[Stage]) -> Path:
    return Path(stages[0].config.output or "")
