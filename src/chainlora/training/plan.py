"""The plan of a run: what of it is left to do.

It is made and checked once (`training.refusing`), before anything is done. `--dry-run` shows it,
and every stage is trained by it.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from chainlora.config.schema import LENGTHS, RunConfig
from chainlora.config.staging import Stage, exists_in, need_apart
from chainlora.data.splits import check_files, rows_of_an_epoch
from chainlora.errors import RunError
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import MAIN, START, read_history
from chainlora.runs.loading_start import load_start, start_at
from chainlora.runs.resuming import (
    check_plugins,
    compare,
    need_start,
    refuse_if_other,
    refuse_if_taken,
)
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.placement import StagePlan, begins_on, left_out, need_below, placed
from chainlora.training.refusing import check_due, naming

logger = logging.getLogger(__name__)

# Without a length, a link reads at least as many rows as one of the study of stages did: 80 steps
# of 8 (benchmarks/stages). A row is read at most 10 times: on the 48 rows of examples/times, the
# validation loss of SmolLM2-135M-Instruct was 0.36 after 4 epochs and 0.27 after 10.
ROWS = 640
MOST_EPOCHS = 10


@dataclass(frozen=True)
class Plan:
    """The stages of a run in their order. `start` is what the first one begins on, or has begun on
    if it was stopped."""

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
    """Say where each stage is, and check the files that the last ended one and a new one depend on.
    Trains nothing.

    Without `resume`, a run in the output is refused. `start` is what a run begins on whose config
    does not name it.

    Raises ChainLoRAError for what the run holds otherwise, and for all that a config, the model,
    this machine or the files of rows tell that cannot be trained.
    """
    output, there = stages[0].config.output, None
    if output is not None:
        run = Path(output)
        need_apart(run)
        refuse_if_other(run) if resume else refuse_if_taken(run)
        there = state_at(run, read_history(run)) if exists_in(run) else None
    if there is not None:
        _need_order(there, stages)
    planned = [
        _planned(stage, there and begun_stage(there.run, stage.name, there.history), change)
        for stage in stages
    ]
    ended = [each.begun for each in planned if each.begun is not None and each.draft is None]
    now = there if ended else None
    if ended:
        ended[-1].verify()
    if planned[0].state != "finished":
        start = _start_of(planned[0], there, start)
    plan = Plan(tuple(placed(planned, now, start)), start)
    new = [each.name for each in plan.due if each.state == "new"]
    if there is not None and new:
        _tell_of_others(there, stages, new[0])
    if now is not None and new:
        need_below(now.verify(), [each.stage for each in plan.stages if each.state == "finished"])
    if plan.due:
        check_due(plan.stages, start, now)
    return plan


def _need_order(now: OpenState, stages: Sequence[Stage]) -> None:
    """Raise RunError unless the stages of a config begin with those that the run has trained."""
    if stages[0].after is not None:
        return
    run, history = now.run, now.history
    lineage = now.lineage
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
                "the stages of a run must be those that it has, in their order",
                f"{got} for {name} in {run}",
                f"add new ones below or by chainlora extend {run}, or choose another output",
            )


def _planned(stage: Stage, begun: OpenState | None, change: Collection[str]) -> StagePlan:
    """Return a stage with its length and what of it was begun, and check both."""
    if begun is None:
        _need_files(stage)
        return StagePlan(_with_length(stage, None))
    stage = _with_length(stage, begun)
    _need_same(stage, begun, change)
    return StagePlan(stage, begun)


def _with_length(stage: Stage, begun: OpenState | None) -> Stage:
    """Return a stage whose links have a length: by default the one that it was begun with, else by
    the number of its rows."""
    chain = stage.config.chain
    if chain.has_length or not chain.ranks:
        return stage
    if begun is not None:
        before = begun.config().chain
        length = {key: getattr(before, key) for key in LENGTHS}
    else:
        epochs = min(MOST_EPOCHS, ceil(ROWS / rows_of_an_epoch(stage.config.data, ROWS)))
        length = {"epochs": (float(epochs),) * len(chain.ranks)}
    config = stage.config.model_copy(update={"chain": chain.model_copy(update=length)})
    if begun is None:
        _tell_length(stage.name, config)
    return replace(stage, config=config)


def _tell_length(name: str, config: RunConfig) -> None:
    """Log the size and length of a stage whose length was chosen here."""
    chain, targets = config.chain, config.chain.target_modules
    ranks = f"rank{'s' * (len(chain.ranks) > 1)} {', '.join(map(str, chain.ranks))}"
    names = [targets] if isinstance(targets, str) else targets
    on = "all linear layers" if targets == "all-linear" else ", ".join(names)
    (epochs, *_) = chain.epochs or ()
    logger.warning(
        "%s: %s on %s, %g epoch%s, rate %g%s (change with --chain.ranks, --chain.epochs, "
        "--train.lr, --data.validation)",
        *(name, ranks, on, epochs, "s" * (epochs > 1), config.train.lr),
        "" if config.data.validation else ", no validation rows",
    )


def _need_files(stage: Stage) -> None:
    """Raise ChainLoRAError unless the files of rows of a new stage can be read."""
    config = stage.config
    with naming(stage):
        check_files(config.data, config.train.loss)
        if config.start_data is not None:
            check_files(config.start_data.as_data(config.data), None)


def _need_same(stage: Stage, begun: OpenState, change: Collection[str]) -> None:
    """Raise ChainLoRAError where a begun stage is not what its config says, or cannot resume."""
    if stage.config.start_data is not None and START not in begun.keepers:
        raise RunError(
            "`start_data` is read when a run begins",
            f"some for {begun.run}, which keeps none",
            f"leave it out, and call chainlora eval {begun.run} --matrix --start-rows FILE",
        )
    compare(begun, stage.config, change, None if stage.name == MAIN else stage.name)
    if begun.draft is not None:
        check_plugins(begun, stage.config)


def _start_of(first: StagePlan, there: OpenState | None, start: Start) -> Start:
    """Return what the first stage begins on, or has begun on."""
    if there is not None and (first.begun is not None or there.history.entries):
        return start_at(begins_on(there, first))
    source = first.stage.config.start
    return start if source is None else load_start(source)


def _tell_of_others(now: OpenState, stages: Sequence[Stage], new: str) -> None:
    """Warn of stages in neither run nor config: half trained, or ended and not combined."""
    names = {stage.name for stage in stages}
    for name in sorted(drafts_in(now.run, now.history).keys() - names):
        logger.warning("stage %s is half trained, and %s begins without it", name, new)
    for name in left_out(now.history):
        if name not in names:
            both = shlex.join([str(now.run), *now.history.ends(now.key), name])
            logger.warning(
                "stage %s has ended and is not in %s; to have it: chainlora combine %s",
                *(name, now.run, both),
            )
