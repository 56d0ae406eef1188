"""All that can be refused before the stages of a plan are trained.

It is told from configs, what a run holds, and the model without its weights. What only a stage that
begins can know, its rows and its weights, is refused by `training.setup`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from chainlora import files
from chainlora.chain.adapters import check_targets
from chainlora.config.schema import RunConfig, StartData
from chainlora.config.staging import Stage
from chainlora.data.division import can_read_again
from chainlora.data.kept import keeps_general, keeps_rows
from chainlora.data.splits import learned_by, length_limit
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.models.loading import accelerator
from chainlora.runs.history import START
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.objectives import check_names
from chainlora.training.optimizers import check_optimizer
from chainlora.training.placement import StagePlan
from chainlora.training.processes import (
    check_shards,
    num_launched,
    refuse_one_process,
    wants_shards,
)

_GIVE_ROWS = "give some as `start_data`, or to a run by eval --matrix --start-rows FILE"


def check_due(
    planned: Sequence[StagePlan],
    start: Start,
    now: OpenState | None,
    base: OpenBase | None = None,
) -> None:
    """Refuse what the stages that are due cannot do, before the first of them is trained.

    `now` is what the run is, None before its first stage has ended, which begins on `start`. `base`
    is opened here by default.
    """
    due = [each for each in planned if each.state != "finished"]
    first = due[0].stage.config
    place = None if first.output is None else Path(first.output)
    if place is not None:
        files.check_writable(place)
    above = None if now is None and start is NOTHING else place  # where the base is found from
    base = OpenBase.of_config(first, above).or_shared(base)
    begun = start if now is None else Start(state=now.at(now.history.origin))
    origin = _losses(begun) | _given(first, start, due[0].state == "new" and now is None)
    below = dict(origin) if now is None else _losses(Start(state=now))
    for each in due:
        config = each.stage.config
        with naming(each.stage if len(planned) > 1 else None):
            _check_processes(config)
            check_names(config)
            check_optimizer(config, accelerator())
            length_limit(config.data, base.context)
            if each.state == "new":
                for link in dict.fromkeys(config.chain.links()):
                    check_targets(base.skeleton, link)
        if each.state == "new":
            if each.name in start.stages and now is None:
                got = f"{each.name!r}, which is there"
                raise RunError("a stage must have a name of its own", got, "choose another")
            _need_rows(each.stage, origin if each.stage.beside else below)
        if not config.data.rehearse:
            loss = learned_by(config.data, config.train.loss)
            below[each.name] = loss if keeps_rows(config.data) else None


def _check_processes(config: RunConfig) -> None:
    count = num_launched()
    if wants_shards(config) and count > 1:
        check_shards(config)
    else:
        refuse_one_process(config)
    if config.train.batch_size % count:
        raise ConfigError(
            "`train.batch_size` is that of all processes together, and must be a multiple of their "
            f"number (got {config.train.batch_size} for {count} processes); start another number "
            "of them, or change it"
        )


def _losses(below: Start) -> dict[str, str | None]:
    """Return what the rows are learned by that the stages below kept, and what a run began on; None
    of those that kept none. Combinations and rehearsals have no rows of their own."""
    lineage, kept = [] if below.state is None else below.state.lineage, below.kept
    names = [e.key for e in lineage if e.kind in ("stage", "import") and not e.is_rehearsal]
    names += [START] if START in kept or below.adapter is not None else []
    return {name: kept[name].loss if name in kept else None for name in names}


def _given(first: RunConfig, start: Start, is_new: bool) -> dict[str, str | None]:
    """Return what the rows are learned by that a config gives for what its run begins on, or that
    the model writes."""
    if not isinstance(first.start_data, StartData) or not is_new:
        begun = None if start.state is None else start.state.history
        is_due = begun is None or begun.find_unbuilt(START) is not None
        return {START: "completion"} if is_new and is_due and keeps_general(first) else {}
    is_own = start.state is not None and exists_in(Path(first.output or "").expanduser())
    if START in start.kept and is_own:
        return {}  # of the same run, which has kept them already
    if START in start.kept:
        got = f"some, and those of {first.start or 'the base'}"
        raise RunError("`start_data` is for a start without such rows", got, "leave it out")
    return {START: learned_by(first.start_data.as_data(first.data), None)}


def _need_rows(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse what needs rows of earlier stages that are not there.

    Imported adapters have no recorded rows.
    """
    data, without = stage.config.data, [name for name, loss in below.items() if loss is None]
    if data.new_rows_only and stage.beside and not below.keys() - {START}:
        rule = f"`data.new_rows_only` of stage {stage.name!r} leaves out rows of stages below it"
        got = "none below, since it stands beside the others"
        raise RunError(rule, got, "train it on top, or leave data.new_rows_only out")
    missing = {
        "data.new_rows_only": [n for n in without if data.new_rows_only and n != START],
        "data.replay": without if data.replay and len(without) == len(below) else [],
        "data.rehearse": without if data.rehearse and len(without) == len(below) else [],
    }
    for key, names in missing.items():
        off = "false" if key == "data.new_rows_only" else "null"
        if names:
            raise RunError(
                f"`{key}` of stage {stage.name!r} needs rows that earlier stages kept",
                f"none of {', '.join(names)}",
                (_GIVE_ROWS if names == [START] else "train those with data.keep_rows: true")
                + (f", or set {key}: {off}" if key != "data.rehearse" else ""),
            )
    losses = {name: loss for name, loss in below.items() if loss is not None}
    own = learned_by(data, stage.config.train.loss)
    again = "replay" if data.replay else "rehearse" if data.rehearse else None
    if again is not None and not any(can_read_again(loss, own) for loss in losses.values()):
        raise RunError(
            f"`data.{again}` of stage {stage.name!r} needs earlier rows that are learned by {own}",
            ", ".join(f"{name}: {loss}" for name, loss in losses.items()) or "no earlier stage",
            "leave data.replay out" if again == "replay" else "train it on rows of its own",
        )


@contextmanager
def naming(stage: Stage | None) -> Iterator[None]:
    """Begin an error's message with the name of a stage."""
    try:
        yield
    except ChainLoRAError as error:
        if stage is not None:
            error.args = (f"stage {stage.name!r}: {error}",)
        raise
