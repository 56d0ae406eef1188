"""The plan of a command: its stages, what of them is left to do, and the entries to declare.

It is made and checked once (`training.refusing`), before anything is done. `--dry-run` shows it,
`runs.declaring` writes it, and `training.building` does what it declares.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from os.path import expanduser
from pathlib import Path

from chainlora.config.schema import LENGTHS, RunConfig, StartData
from chainlora.config.staging import Stage
from chainlora.data.kept import keeps_general
from chainlora.data.splits import check_files, rows_of_an_epoch
from chainlora.errors import RunError
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import history_of_start
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import MAIN, START, Base, History, Unbuilt
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import load_start, start_at
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart
from chainlora.runs.resuming import (
    check_plugins,
    compare,
    need_start,
    refuse_if_other,
    refuse_if_taken,
)
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.placement import Declaring, StagePlan, need_below, placed
from chainlora.training.processes import num_launched, wants_shards
from chainlora.training.refusing import check_due, naming

logger = logging.getLogger(__name__)

# Without a length, a link reads at least as many rows as one of the study of stages did: 80 steps
# of 8 (benchmarks/stages). A row is read at most 10 times: on the 48 rows of examples/times, the
# validation loss of SmolLM2-135M-Instruct was 0.36 after 4 epochs and 0.27 after 10.
ROWS = 640
MOST_EPOCHS = 10


def _nothing() -> History:
    return History(base=Base(model="", fingerprint=""), hold="")


@dataclass(frozen=True)
class Plan:
    """The stages of a command in their order, and the entries that it declares for them.

    `start` is what a new run begins on, `history` is what the run's is, or what it begins with.
    `keys` are all entries that the command is about, `configs` those of stages, `target` is what
    the run is to become. Without a run there are stages alone.
    """

    stages: tuple[StagePlan, ...]
    start: Start = NOTHING
    run: Path = Path()
    history: History = field(default_factory=_nothing)
    new: tuple[Unbuilt, ...] = ()
    keys: tuple[str, ...] = ()
    configs: Mapping[str, RunConfig] = field(default_factory=dict)
    target: str | None = None

    @property
    def due(self) -> list[StagePlan]:
        return [each for each in self.stages if each.state != "finished"]

    @property
    def combined(self) -> set[str]:
        """Return the keys of all entries below the combinations that are to be built."""
        history = self.history.declared(self.new, None)
        due = (history.find_unbuilt(key) for key in self.keys)
        keys = [entry.key for entry in due if entry is not None and entry.kind == "combine"]
        return {name for key in keys for name in history.below(key)}

    def after(self, name: str) -> list[str]:
        """Say what is to be computed when a stage has ended."""
        known = [self.history.find_unbuilt(key) for key in self.keys]
        found = {entry.key: entry for entry in (*known, *self.new) if entry is not None}
        left = [e for e in found.values() if e.unit == name and e.key not in (name, START)]
        return ["rehearsal" if entry.is_rehearsal else "combination" for entry in left]


def make_plan(
    stages: Sequence[Stage],
    change: Collection[str] = (),
    *,
    resume: bool = True,
    base: OpenBase | None = None,
) -> Plan:
    """Say where each stage is, what is to be declared, and check the files that the last ended one
    and a new one depend on. Writes and trains nothing.

    Without `resume`, a run in the output is refused.

    Raises ChainLoRAError for what the run holds otherwise, and for all that a config, the model,
    this machine or the files of rows tell that cannot be trained.
    """
    output, there = stages[0].config.output, None
    if output is not None:
        run = Path(expanduser(output))
        need_apart(run)
        refuse_if_other(run) if resume else refuse_if_taken(run)
        there = state_at(run, read_history(run)) if exists_in(run) else None
    if there is not None:
        _need_order(there, stages)
    else:
        stages = [_without_general(stages[0]), *stages[1:]]
    planned = [
        _planned(stage, there and begun_stage(there.run, stage.name, there.history), change)
        for stage in stages
    ]
    ended = [each.begun for each in planned if each.begun is not None and each.draft is None]
    now = there if ended else None
    if ended:
        ended[-1].verify()
    start = NOTHING
    if planned[0].state != "finished":
        start = _start_of(planned[0], there)
    plan = Plan(tuple(placed(planned, now, start)), start)
    if output is not None:
        plan = _with_entries(plan, run, there)
    new = [each.name for each in plan.due if each.state == "new"]
    if there is not None and new:
        names = {*plan.combined, *(stage.name for stage in stages)}
        for name in sorted(drafts_in(there.run, there.history).keys() - names):
            logger.warning("stage %s is half trained, and %s begins without it", name, new[0])
    if now is not None and new:
        below = [each.stage for each in plan.stages if each.state == "finished"]
        need_below(now.verify(), below, plan.combined)
    if plan.due:
        check_due(plan.stages, start, now, base)
    return plan


def _with_entries(plan: Plan, run: Path, there: OpenState | None) -> Plan:
    """Return a plan with the entries that it declares."""
    first = plan.stages[0]
    if there is not None:
        history = there.history
    else:
        config, known = first.stage.config, plan.start.state
        base = known.base if known is not None else Base(model=config.model, fingerprint="")
        history = history_of_start(plan.start, base, config, first.name)
    found = Declaring(history, run)
    found.add_all(plan.stages)
    return replace(plan_of(found), stages=plan.stages, start=plan.start)


def plan_of(found: Declaring) -> Plan:
    """Return the plan of a run whose entries are declared so, without a stage of a config."""
    return Plan(
        (),
        run=found.run,
        history=found.before,
        new=tuple(found.new),
        keys=tuple(found.keys),
        configs=found.configs,
        target=found.target,
    )


def _need_order(now: OpenState, stages: Sequence[Stage]) -> None:
    """Raise RunError unless the stages of a config begin with those that the run has trained."""
    if stages[0].after is not None:
        return
    run, history = now.run, now.history
    lineage = now.lineage
    own = [e for e in history.own if e in lineage and e.has_config and not e.is_rehearsal]
    known = [entry.key for entry in own if entry.kind == "stage"]
    if own and not known and stages[0].name not in {entry.key for entry in own}:
        rule = "the first stage of a config begins a run"
        remedy = f"add it by chainlora extend {run}, or choose another output"
        raise RunError(rule, f"{run}, which has {own[0].key}", remedy)
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


def _without_general(first: Stage) -> Stage:
    """Return the first stage of a new run, without rows that the model writes (`start_data`) where
    several processes share it: the first one, which writes them alone, need not have room."""
    config = first.config
    if config.output is None or not keeps_general(config):
        return first
    if num_launched() < 2 or not wants_shards(config):
        return first
    logger.warning("no rows of `base` are kept, since processes share the model")
    return replace(first, config=config.model_copy(update={"start_data": "none"}))


def _with_length(stage: Stage, begun: OpenState | None) -> Stage:
    """Return a stage whose links have a length: by default the one that it was begun with, else by
    the number of its rows."""
    chain = stage.config.chain
    if chain.has_length or not chain.ranks or stage.config.data.rehearse:
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
        if isinstance(config.start_data, StartData):
            check_files(config.start_data.as_data(config.data), None)


def _need_same(stage: Stage, begun: OpenState, change: Collection[str]) -> None:
    """Raise ChainLoRAError where a begun stage is not what its config says, or cannot resume."""
    if isinstance(stage.config.start_data, StartData) and START not in begun.keepers:
        raise RunError(
            "`start_data` is read when a run begins",
            f"some for {begun.run}, which keeps none",
            f"leave it out, and call chainlora eval {begun.run} --matrix --start-rows FILE",
        )
    compare(begun, stage.config, change, None if stage.name == MAIN else stage.name)
    if begun.draft is not None:
        check_plugins(begun, stage.config)


def _start_of(first: StagePlan, there: OpenState | None) -> Start:
    """Return what the first stage begins on, or has begun on."""
    if there is None:
        source = first.stage.config.start
        return NOTHING if source is None else load_start(source)
    if first.begun is not None:
        return start_at(first.begun.parent)
    history = there.history
    if history.find_unbuilt(history.origin) is not None and first.stage.config.start is not None:
        return load_start(first.stage.config.start)  # it was declared, and is not imported yet
    key = history.origin if first.stage.beside else first.stage.after
    return start_at(there if key is None else there.at(key))
