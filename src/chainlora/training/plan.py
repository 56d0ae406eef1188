"""The plan of a run: what of it is left to do, and all that can be refused before it is done.

It is made and checked once, from configs, files, and the model without its weights. `--dry-run`
shows it, and every stage is trained by it. What only a stage that begins can know, its rows and its
weights, is found by `training.setup`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from chainlora import files
from chainlora.chain.adapters import check_targets, inside, matched_modules
from chainlora.chain.checks import check_apart, check_strengths
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.config.staging import Stage, exists_in, need_apart
from chainlora.data.division import can_read_again
from chainlora.data.kept import Kept, keeps_rows
from chainlora.data.splits import check_files, learned_by, length_limit
from chainlora.errors import ChainError, ChainLoRAError, ConfigError, RunError
from chainlora.models.finding import from_above
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import MAIN, START, History, read_history
from chainlora.runs.loading_start import load_start, start_at
from chainlora.runs.locks import refuse_links
from chainlora.runs.resuming import (
    check_plugins,
    compare,
    need_start,
    refuse_if_other,
    refuse_if_taken,
)
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.objectives import check_names
from chainlora.training.optimizers import check_optimizer
from chainlora.training.placement import placed
from chainlora.training.processes import (
    check_shards,
    num_launched,
    refuse_one_process,
    wants_shards,
)

logger = logging.getLogger(__name__)

_GIVE_ROWS = "give some as `start_data`, or to a run by eval --matrix --start-rows FILE"


@dataclass(frozen=True)
class StagePlan:
    """A stage that has ended, or that is to be trained from `step` on."""

    stage: Stage
    state: Literal["finished", "stopped", "new"]
    step: int = 0
    trained: bool = False  # and stopped before it was judged or published

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """The stages of a run in their order. `start` is what the first one begins on that is due."""

    stages: tuple[StagePlan, ...]
    start: Start = NOTHING

    @property
    def due(self) -> list[StagePlan]:
        return [each for each in self.stages if each.state != "finished"]


def make_plan(
    stages: Sequence[Stage],
    change: Collection[str] = (),
    *,
    resume: bool = True,
    start: Start = NOTHING,
) -> Plan:
    """Say where each stage is, and check the files that the last ended one depends on. Trains
    nothing.

    Without `resume`, a run in the output is refused. `start` is what a run begins on whose config
    does not name it.

    Raises ChainLoRAError for what the run holds otherwise, and for all that a config, the model,
    this machine or the files of rows tell that cannot be trained.
    """
    output = stages[0].config.output
    run = None if output is None else Path(output)
    if run is not None:
        need_apart(run)
        refuse_if_other(run) if resume else refuse_if_taken(run)
    history = read_history(run) if run is not None and exists_in(run) else None
    if run is not None and history is not None:
        _need_order(run, history, stages)
    plan = Plan(tuple(_state_of(stage, run, history, change) for stage in stages))
    ended = [each.name for each in plan.stages if each.state == "finished"]
    now, begun = None, dict[str, OpenState]()
    if run is not None and history is not None:
        found = ((stage.name, begun_stage(run, stage.name, history)) for stage in stages)
        begun = {name: each for name, each in found if each is not None}
        if ended:
            now = state_at(run, history)
            now.at(ended[-1]).verify()
    if now is None:
        plan = replace(plan, start=_start_of(plan, run, history, start))
    pairs = zip(plan.stages, placed(stages, begun, now, plan.start), strict=True)
    plan = replace(plan, stages=tuple(replace(each, stage=stage) for each, stage in pairs))
    if now is not None and any(each.state == "new" for each in plan.stages):
        need_below(now.run, now.history, [e.stage for e in plan.stages if e.state == "finished"])
    if plan.due:
        if now is not None:
            plan = replace(plan, start=_start_of(plan, run, history, start))
        _check(plan, now)
    return plan


def need_below(run: Path, history: History, ended: Sequence[Stage]) -> None:
    """Raise RunError unless these stages are in what the run is now, or are to be combined with it
    after a kill."""
    known = taken_in(history)
    below = {entry.key for entry in history.lineage(history.head)}
    below |= {stage.name for stage in ended if stage.beside and stage.name not in known}
    if missing := [stage.name for stage in ended if stage.name not in below]:
        names = {stage.name for stage in ended}
        whole = [e.key for e in history.entries if names <= {a.key for a in history.lineage(e.key)}]
        raise RunError(
            f"Cannot begin a stage on {history.head}, which {run} is now: it is without "
            f"{missing[-1]}. Run chainlora undo {run} --to {[*missing, *whole][-1]}, then the same "
            "command."
        )


def taken_in(history: History) -> set[str]:
    """Return the entries that are in what a run is now, or in a combination that it has been."""
    combined = [entry for entry in history.entries if entry.kind == "combine"]
    parents = {key for entry in combined for key in entry.parents}
    return parents | {entry.key for entry in history.lineage(history.head)}


# --- where the stages are ---


def _need_order(run: Path, history: History, stages: Sequence[Stage]) -> None:
    """Raise RunError unless the stages of a config begin with those that the run has trained."""
    if stages[0].after is not None:
        return
    lineage = history.lineage(history.head)
    known = [
        e.key for e in history.own if e in lineage and e.kind == "stage" and not e.is_rehearsal
    ]
    last = stages[-1].name
    names = [e.name for e in stages if e.name in known or history.find(e.name) is None]
    if history.find(last) is not None:
        known = known[: len(names)]
    for place, name in enumerate(known):
        if names[place : place + 1] != [name]:
            need_start(state_at(run, history, known[0]).config(), stages[0].config)
            got = names[place] if place < len(names) else "none"
            raise RunError(
                f"the stages of a run must be those that it has, in their order (got {got} for "
                f"{name} in {run}); add new ones below, or choose another output"
            )


def _state_of(
    stage: Stage, run: Path | None, history: History | None, change: Collection[str]
) -> StagePlan:
    begun = None if run is None else begun_stage(run, stage.name, history)
    if begun is None:
        config = stage.config
        with naming(stage):
            check_files(config.data, config.train.loss)
            if config.start_data is not None:
                check_files(config.start_data.as_data(config.data), None)
        return StagePlan(stage, "new")
    given = begun.history.find(START)
    if stage.config.start_data is not None and (given is None or given.kept is None):
        raise RunError(
            "`start_data` is read when a run begins",
            f"some for {run}, which keeps none",
            f"leave it out, and call chainlora eval {run} --matrix --start-rows FILE",
        )
    compare(begun, stage.config, change, None if stage.name == MAIN else stage.name)
    if begun.draft is None:
        return StagePlan(stage, "finished")
    if not begun.draft.trained:
        check_plugins(begun, stage.config)
        if stage.config.chain.tune == "full":
            raise ConfigError(
                "full fine-tuning cannot resume, since its optimizer state is not saved",
                begun.run,
                "delete that folder, or choose another output",
            )
    return StagePlan(stage, "stopped", begun.draft.position.step, begun.draft.trained)


def _start_of(plan: Plan, run: Path | None, history: History | None, start: Start) -> Start:
    """Return what the first new stage begins on, or a stopped one has begun on."""
    first = plan.due[0]
    if run is not None and first.state == "stopped":
        begun = begun_stage(run, first.name, history)
        assert begun is not None
        return start_at(begun.parent)
    if run is not None and history is not None and history.entries:
        others = drafts_in(run, history).keys() - {each.name for each in plan.stages}
        if others:
            names = ", ".join(sorted(others))
            logger.warning("stage %s is half trained, and %s begins without it", names, first.name)
        now, stage = state_at(run, history), first.stage
        key = history.origin if stage.beside else stage.after
        return start_at(now if key is None else now.at(key))
    source = first.stage.config.start
    return start if source is None else load_start(source)


# --- what can be refused ---


def _check(plan: Plan, now: OpenState | None) -> None:
    """Refuse what the stages that are due cannot do, before the first of them is trained. `now` is
    what the run is, None before its first stage has ended."""
    first = plan.due[0].stage.config
    if first.output is not None:
        files.check_writable(Path(first.output))
        refuse_links(Path(first.output))
    is_elsewhere = plan.due[0].state == "stopped" or plan.start is not NOTHING
    place = Path(first.output) if first.output is not None and is_elsewhere else None
    model = load_skeleton(first.model if place is None else from_above(first.model, place))
    has_one, cpu = torch.accelerator.is_available(), torch.device("cpu")
    device = (torch.accelerator.current_accelerator() if has_one else None) or cpu
    below = _losses(plan.start.state, plan.start.kept)
    if plan.start.adapter is not None:
        below.setdefault(START, None)
    taken = {*plan.start.stages, *below}
    if first.start_data is not None and plan.due[0].state == "new":
        if START in plan.start.kept:
            got = f"some, and those of {first.start or 'the base'}"
            raise RunError("`start_data` is for a start without such rows", got, "leave it out")
        below[START] = learned_by(first.start_data.as_data(first.data), None)
    origin, state = dict(below), plan.start.state
    if now is not None:
        first_state = now.at(now.history.origin)
        origin = _losses(first_state, first_state.kept())
        below |= _losses(now, now.kept())
        state = now if plan.due[0].state == "new" else state
    links = list(plan.start.links) if state is None else state.outlines()
    tuned: dict[LinkConfig, None] = dict.fromkeys(link.config for link in links)
    for each in plan.due:
        config = each.stage.config
        with naming(each.stage if len(plan.stages) > 1 else None):
            _check_processes(config)
            check_names(config)
            check_optimizer(config, device)
            length_limit(config.data, context_length(model))
            if config.chain.tune == "lora":
                adapted = {name for other in tuned for name in matched_modules(model, other)}
                whole = {name for other in tuned for name in inside(model, other.extra_modules)}
                for link in dict.fromkeys(config.chain.links()):
                    check_targets(model, link)
                    check_apart(adapted, whole, model, link)
        links += [Link(len(links), link, {}) for link in config.chain.links()]
        if each.state == "new":
            if each.name in taken:
                got = f"{each.name!r}, which is there"
                raise RunError("a stage must have a name of its own", got, "choose another")
            _need_rows(each.stage, origin if each.stage.beside else below)
            _need_sum(each.stage, links)
        if not config.data.rehearse:
            loss = learned_by(config.data, config.train.loss)
            below[each.name] = loss if keeps_rows(config.data) else None
        tuned |= dict.fromkeys(config.chain.links())


def _check_processes(config: RunConfig) -> None:
    count = num_launched()
    if wants_shards(config) is not None and count > 1:
        check_shards(config)
    else:
        refuse_one_process(config)
    if config.train.batch_size % count:
        raise ConfigError(
            "`train.batch_size` is that of all processes together, and must be a multiple of their "
            f"number (got {config.train.batch_size} for {count} processes); start another number "
            "of them, or change it"
        )


def _losses(state: OpenState | None, kept: Mapping[str, Kept]) -> dict[str, str | None]:
    """Return what the rows are learned by that the stages of a state kept, and what a run began on;
    None of those that kept none. Combinations and rehearsals have no rows of their own."""
    lineage = [] if state is None else state.lineage
    names = [e.key for e in lineage if e.kind in ("stage", "import") and not e.is_rehearsal]
    names += [START] if START in kept else []
    return {name: kept[name].loss if name in kept else None for name in names}


def _need_rows(stage: Stage, below: Mapping[str, str | None]) -> None:
    """Refuse what needs rows of earlier stages that are not there.

    Imported adapters have no recorded rows.
    """
    data, without = stage.config.data, [name for name, loss in below.items() if loss is None]
    missing = {
        "train.accept_links": without if stage.tolerance is not None else [],
        "data.new_rows_only": [n for n in without if data.new_rows_only and n != START],
        "data.replay": without if data.replay and len(without) == len(below) else [],
        "data.rehearse": without if data.rehearse and len(without) == len(below) else [],
    }
    for key, names in missing.items():
        off = {"train.accept_links": "all", "data.new_rows_only": "false"}.get(key, "null")
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


def _need_sum(stage: Stage, links: Sequence[Link]) -> None:
    """Refuse a stage on links of a strength that it cannot be tuned on."""
    try:
        check_strengths(links)
    except ChainError as error:
        raise RunError(
            f"stage {stage.name!r} cannot be trained on these strengths",
            error,
            "restore that one by `mix`, or prune it",
        ) from None


@contextmanager
def naming(stage: Stage | None) -> Iterator[None]:
    """Begin an error's message with the name of a stage."""
    try:
        yield
    except ChainLoRAError as error:
        if stage is not None:
            error.args = (f"stage {stage.name!r}: {error}",)
        raise
