"""Where the stages of a chain are, and what new ones cannot have: refused before any is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from chainlora.chain.adapters import check_targets, inside, matched_modules
from chainlora.chain.checks import check_apart, check_strengths
from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.config.stages import Stage, need_apart
from chainlora.data.division import can_read_again
from chainlora.data.kept import Kept
from chainlora.data.splits import check_files, learned_by, length_limit
from chainlora.errors import ChainError, ChainLoRAError, RunError
from chainlora.models.finding import from_above
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.loading_start import load_start
from chainlora.runs.manifest import START
from chainlora.runs.reading import RunReader
from chainlora.runs.resuming import compare, refuse_if_other
from chainlora.runs.stages import STAGES, first_is_open, half_trained, read_stages, reader_of
from chainlora.runs.start import NOTHING, Start
from chainlora.training.objectives import check_names
from chainlora.training.optimizers import check_optimizer

_GIVE_ROWS = "give some as `start_data`, or to a run by eval --matrix --start-rows FILE"


@dataclass(frozen=True)
class StageState:
    """Where a stage is: `step` and `links` are those that a resume begins from."""

    name: str
    state: Literal["finished", "pruned", "stopped", "new"]
    step: int = 0


def survey(stages: Sequence[Stage], change: Collection[str] = ()) -> list[StageState]:
    """Say where each stage is, all files of those that have ended checked. Trains nothing.

    Raises RunError where the run holds other stages than these, or one of them with other contents,
    DataError where a new one has no rows.
    """
    run = run_of(stages)
    need_apart(run)
    refuse_if_other(RunReader(run))
    if not (run / "chain.json").is_file() and not (run / STAGES).is_file():
        found = [_new(stage) for stage in stages]
    else:
        known, here = ended_stages(run, stages), read_stages(run).here
        found = [
            _pruned(stage)
            if stage.name in known and stage.name not in here
            else _state_of(stage, stage.name in known and not first_is_open(run), change)
            for stage in stages
        ]
    below, links = _begun_on(stages)
    for stage, where in zip(stages, found, strict=True):
        if where.state in ("new", "stopped"):
            links += [Link(len(links), each, {}) for each in stage.config.chain.links()]
        if where.state == "new":
            need_no_other(stage, stages)
            need_name(stage, below)
            need_rows(stage, below)
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
        loaded = reader_of(reader.path).manifest().loaded
        return below, [entry.outline() for entry in loaded]
    start = NOTHING if first.start is None else load_start(first.start, stages[0].name)
    return what_is_below(start, first), list(start.links)


def what_is_below(start: Start, config: RunConfig) -> dict[str, str | None]:
    """Return the stages below one that begins there, and what their kept rows are learned by.

    Raises RunError where the config brings rows for the start to those that are there.
    """
    names = [START] if start.adapter is not None else [entry.stage for entry in start.entries]
    below = _losses(names, start.kept)
    if config.start_data is None:
        return below
    if START in start.kept:
        rule = "`start_data` is for a start without such rows"
        raise RunError(rule, f"{config.start}, which has some", "leave it out")
    return below | {START: learned_by(config.start_data.as_data(), None)}


def _losses(names: Iterable[str], kept: Mapping[str, Kept]) -> dict[str, str | None]:
    names = [*names, *([START] if START in kept else [])]
    return {name: kept[name].loss if name in kept else None for name in names}


def ended_stages(run: Path, stages: Sequence[Stage]) -> list[str]:
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


def _pruned(stage: Stage) -> StageState:
    reader = RunReader(stage.config.output or "")
    compare(reader, reader.manifest(), stage.config, stage=stage.name)
    return StageState(stage.name, "pruned")


def _new(stage: Stage) -> StageState:
    """Refuse what the files of a stage tell, before hours of the stages before it."""
    with naming(stage):
        check_files(stage.config.data, stage.config.train.loss)
        if stage.config.start_data is not None:
            check_files(stage.config.start_data.as_data(stage.config.data), None)
    return StageState(stage.name, "new")


def _state_of(stage: Stage, has_ended: bool, change: Collection[str]) -> StageState:
    reader = RunReader(stage.config.output or "")
    if not has_ended and not reader.exists:
        return _new(stage)
    manifest = reader.verify()
    if stage.config.start_data is not None and START not in manifest.kept:
        raise RunError(
            "`start_data` is read when a run begins",
            f"some for {reader}, which keeps none",
            f"leave it out, and call chainlora eval {reader} --matrix --start-rows FILE",
        )
    compare(reader, manifest, stage.config, change, stage.name)
    is_finished = has_ended and reader.is_finished(manifest)
    state: Literal["finished", "stopped"] = "finished" if is_finished else "stopped"
    return StageState(stage.name, state, manifest.position.step)


def need_model(stages: Sequence[Stage], found: Sequence[StageState], ahead: int = 1) -> None:
    """Refuse what the model or this machine cannot do, before hours of the stages before it.

    The first stage that is to be trained (`ahead`) is not looked at: it is checked when it begins.
    """
    first = ahead + sum(where.state in ("finished", "pruned") for where in found)
    later = stages[first:]
    if not later:
        return
    base = stages[0].config.model
    model = load_skeleton(base if found[0].state == "new" else from_above(base, run_of(stages)))
    has_one, cpu = torch.accelerator.is_available(), torch.device("cpu")
    device = (torch.accelerator.current_accelerator() if has_one else None) or cpu
    below = [
        link
        for stage, where in zip(stages[:first], found, strict=False)
        for link in (stage.config.chain.links() if where.state != "pruned" else [])
    ]
    for stage in later:
        with naming(stage):
            check_names(stage.config)
            check_optimizer(stage.config, device)
            length_limit(stage.config.data, context_length(model))
            others = dict.fromkeys(below)
            adapted = {name for other in others for name in matched_modules(model, other)}
            whole = {name for other in others for name in inside(model, other.extra_modules)}
            for link in dict.fromkeys(stage.config.chain.links()):
                check_targets(model, link)
                check_apart(adapted, whole, model, link)
        below += stage.config.chain.links()


def need_no_other(stage: Stage, stages: Sequence[Stage]) -> None:
    """Refuse a new stage while another one is half trained, which would go on without it.

    One that comes before it in the config is trained first.
    """
    run = run_of(stages)
    begun = half_trained(run, read_stages(run)) if (run / "chain.json").is_file() else []
    names = [each.name for each in stages[: stages.index(stage) + 1]]
    others = [path for path in begun if path.name not in names]
    if others:
        rule = "a stage can begin when no other is half trained"
        raise RunError(rule, others[0], "finish it, or delete that folder")


def need_name(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse a name that a stage has which the chain begins on, before any is trained."""
    if stage.name in below:
        raise RunError(
            "a stage must have a name of its own",
            f"{stage.name!r}, which is there",
            "choose another",
        )


def need_rows(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse what needs rows of earlier stages that are not there, before any is trained.

    Of what was made elsewhere nobody knows the rows, new or not.
    """
    data, without = stage.config.data, [name for name, loss in below.items() if loss is None]
    missing = {
        "train.accept_links": without if stage.tolerance is not None else [],
        "data.new_rows_only": [n for n in without if data.new_rows_only and n != START],
        "data.replay": without if data.replay and len(without) == len(below) else [],
    }
    for key, names in missing.items():
        off = {"train.accept_links": "all", "data.new_rows_only": "false"}.get(key, "null")
        if names:
            raise RunError(
                f"`{key}` of stage {stage.name!r} needs rows that earlier stages kept",
                f"none of {', '.join(names)}",
                (_GIVE_ROWS if names == [START] else "train those with data.keep_rows: true")
                + f", or set {key}: {off}",
            )
    losses = {name: loss for name, loss in below.items() if loss is not None}
    own = learned_by(data, stage.config.train.loss)
    if data.replay and not any(can_read_again(loss, own) for loss in losses.values()):
        raise RunError(
            f"`data.replay` of stage {stage.name!r} needs earlier rows that are learned by {own}",
            ", ".join(f"{name}: {loss}" for name, loss in losses.items()) or "no earlier stage",
            "set data.replay: null in that stage",
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


@contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Begin an error's message with the name of the stage."""
    try:
        yield
    except ChainLoRAError as error:
        error.args = (f"stage {stage.name!r}: {error}",)
        raise


def run_of(stages: Sequence[Stage]) -> Path:
    """Return the run that stages are of."""
    return Path(stages[0].config.output or "")
