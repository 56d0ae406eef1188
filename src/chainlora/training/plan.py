"""The plan of a command: its stages, how far each has come, and the entries to declare.

A plan is made and checked (`training.refusing`) before anything is written. `--dry-run` shows it,
`runs.declaring` writes its entries, and `training.building` builds them.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from os.path import expanduser
from pathlib import Path

from chainlora.config.schema import LENGTHS, DataConfig, RunConfig, StartData
from chainlora.config.staging import Stage
from chainlora.data.kept import keeps_general
from chainlora.data.splits import check_files, rows_of_an_epoch
from chainlora.errors import RunError
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import declared_config, history_of_start
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import MAIN, START, Base, History, Unbuilt
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING, Start, load_start, start_at
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart
from chainlora.runs.resuming import (
    check_plugins,
    compare,
    need_same_beginning,
    refuse_if_other,
    refuse_if_taken,
)
from chainlora.runs.state import OpenState
from chainlora.training.optimizers import reads_adam_keys
from chainlora.training.placement import Declaring, StagePlan, need_below, placed
from chainlora.training.processes import num_launched, wants_shards
from chainlora.training.refusing import check_due, naming

logger = logging.getLogger(__name__)

# The default length of a link: at least as many rows as in benchmarks/stages (80 steps of 8 rows),
# but at most 10 epochs: on the 48 rows of examples/times, the validation loss of
# SmolLM2-135M-Instruct was 0.36 after 4 epochs and 0.27 after 10.
ROWS = 640
MOST_EPOCHS = 10


@dataclass(frozen=True)
class Plan:
    """The stages of a command in their order, and the entries that it declares for them.

    Without an output there is no run, and only `stages` and `start` are set.
    """

    stages: tuple[StagePlan, ...]
    start: Start = NOTHING  # of a new run
    run: Path = Path()
    # the history before the command; of a new run, its first
    history: History = field(
        default_factory=lambda: History(base=Base(model="", fingerprint=""), hold="")
    )
    new: tuple[Unbuilt, ...] = ()  # entries to declare
    keys: tuple[str, ...] = ()  # all entries of the command, also those declared before
    configs: Mapping[str, RunConfig] = field(default_factory=dict)  # by the key of a stage
    target: str | None = None  # the future head, if it changes

    @property
    def due(self) -> list[StagePlan]:
        """Return the stages that are not finished."""
        return [planned for planned in self.stages if planned.state != "finished"]

    @property
    def combined(self) -> set[str]:
        """Return the keys of unbuilt combinations and of their ancestors."""
        history = self.history.declared(self.new, None)
        unbuilt = (history.find_unbuilt(key) for key in self.keys)
        keys = [entry.key for entry in unbuilt if entry is not None and entry.kind == "combine"]
        return {name for key in keys for name in history.below(key)}

    def is_combined_after(self, name: str) -> bool:
        """Say whether a combination follows a stage."""
        known = [self.history.find_unbuilt(key) for key in self.keys]
        entries = (entry for entry in (*known, *self.new) if entry is not None)
        return any(e.unit == name and e.kind == "combine" for e in entries)


def make_plan(
    stages: Sequence[Stage],
    *,
    resume: bool = True,
    base: OpenBase | None = None,
) -> Plan:
    """Plan the stages of a command and check them; write and train nothing.

    The files of the last finished stage are verified, and those of the head, if a new stage depends
    on it. Without `resume`, an existing run in the output is refused.
    """
    # 1. Find the run, and how far each stage has come.
    output, existing = stages[0].config.output, None
    if output is not None:
        run = Path(expanduser(output))
        need_apart(run)
        refuse_if_other(run) if resume else refuse_if_taken(run)
        existing = state_at(run, read_history(run)) if exists_in(run) else None
    if existing is not None:
        _need_order(existing, stages)
    if existing is None or not existing.history.entries:
        stages = [_without_general(stages[0]), *stages[1:]]
    planned = [_planned(stage, existing) for stage in stages]
    finished = [p.begun for p in planned if p.begun is not None and p.draft is None]
    head = existing if finished else None
    if finished:
        finished[-1].verify()
    # 2. Place each stage beside the others or on top, and list the entries to declare.
    start = NOTHING
    if planned[0].state != "finished":
        start = _start_of(planned[0], existing)
    planned = placed(planned, head, start)
    if output is None:
        plan = Plan(tuple(planned), start)
    else:
        plan = _with_entries(planned, start, run, existing)
    # 3. Refuse what cannot be trained.
    _check_new(plan, existing, head)
    if plan.due:
        check_due(plan.stages, start, head, base)
    return plan


def _check_new(plan: Plan, existing: OpenState | None, head: OpenState | None) -> None:
    """Warn of unfinished stages that new ones do not include; verify the head below new stages."""
    new = [planned.name for planned in plan.due if planned.state == "new"]
    if existing is not None and new:
        names = {*plan.combined, *(planned.name for planned in plan.stages)}
        for name in sorted(drafts_in(existing.run, existing.history).keys() - names):
            logger.warning("stage %s is unfinished; %s does not include it", name, new[0])
    if head is not None and new:
        finished = [planned.stage for planned in plan.stages if planned.state == "finished"]
        need_below(head.verify(), finished, plan.combined)


def _with_entries(
    stages: Sequence[StagePlan], start: Start, run: Path, existing: OpenState | None
) -> Plan:
    """Return a plan with the entries to declare."""
    config, state = stages[0].stage.config, start.state
    if existing is not None:
        history = existing.history
        has_stage = any(entry.key != START for entry in history.entries)
        if history.unbuilt and not has_stage and stages[0].state == "new":
            need_same_beginning(run, declared_config(run, history.unbuilt[0]), config)
    else:
        base = state.base if state is not None else Base(model=config.model, fingerprint="")
        history = history_of_start(start, base, config, stages[0].name)
    declaring = Declaring(history, run)
    declaring.add_all(stages)
    return plan_of(declaring, stages, start)


def plan_of(declaring: Declaring, stages: Sequence[StagePlan] = (), start: Start = NOTHING) -> Plan:
    """Return a plan that declares entries."""
    return Plan(
        tuple(stages),
        start,
        run=declaring.run,
        history=declaring.before,
        new=tuple(declaring.new),
        keys=tuple(declaring.keys),
        configs=declaring.configs,
        target=declaring.target,
    )


def _need_order(head: OpenState, stages: Sequence[Stage]) -> None:
    """Raise RunError unless a config lists the run's trained stages first, in their order."""
    if stages[0].after is not None:  # a stage of `extend`
        return
    run, history = head.run, head.history
    lineage = head.lineage
    entries = [e for e in history.own if e in lineage and e.has_config]
    known = [entry.key for entry in entries if entry.kind == "stage"]
    if entries and not known and stages[0].name not in {entry.key for entry in entries}:
        rule = "the first stage of a config begins a run"
        remedy = f"add it by chainlora extend {shlex.quote(str(run))}, or choose another output"
        raise RunError(rule, f"{run}, which has {entries[0].key}", remedy)
    last = stages[-1].name
    names = [s.name for s in stages if s.name in known or history.find(s.name) is None]
    if history.find(last) is not None:
        known = known[: len(names)]
    for place, name in enumerate(known):
        if names[place : place + 1] != [name]:
            got = names[place] if place < len(names) else "none"
            raise RunError(
                "`stages` must list the run's stages in their order, then new ones",
                f"{got} for {name} in {run}",
                f"add new ones below or by chainlora extend {shlex.quote(str(run))}, or choose "
                "another output",
            )


def _planned(stage: Stage, existing: OpenState | None) -> StagePlan:
    """Return a stage with its length, and with its state if it was begun; check both."""
    begun = existing and begun_stage(existing.run, stage.name, existing.history)
    if begun is None:
        _need_files(stage)
        _warn_of_unread(stage)
        return StagePlan(_with_length(stage, None))
    stage = _with_length(stage, begun)
    _need_same(stage, begun)
    return StagePlan(stage, begun)


def _without_general(first: Stage) -> Stage:
    """Return the first stage of a new run; if the model is sharded, without general rows."""
    # the first process would write these rows alone, and may lack the memory for the whole model
    config = first.config
    is_due = config.output is not None and keeps_general(config)
    if not is_due or num_launched() < 2 or not wants_shards(config):
        return first
    logger.warning("no rows of `base` are kept, since processes share the model")
    return replace(first, config=config.model_copy(update={"start_data": "none"}))


def _with_length(stage: Stage, begun: OpenState | None) -> Stage:
    """Return a stage whose links have a length: given, as it was begun, or from its rows."""
    chain = stage.config.chain
    if chain.has_length or not chain.ranks:
        return stage
    if begun is not None:
        before = begun.config().chain
        length = {key: getattr(before, key) for key in LENGTHS}
    else:
        length = {"epochs": (default_epochs(stage.config.data),) * len(chain.ranks)}
    config = stage.config.model_copy(update={"chain": chain.model_copy(update=length)})
    if begun is None:
        _tell_length(stage.name, config)
    return replace(stage, config=config)


def default_epochs(data: DataConfig) -> float:
    """Return the epochs of a link without a length: one, or what reads `ROWS` rows."""
    return float(min(MOST_EPOCHS, ceil(ROWS / rows_of_an_epoch(data, ROWS))))


def _tell_length(name: str, config: RunConfig) -> None:
    """Log the ranks, the chosen length and the learning rate of a stage."""
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
    """Raise ChainLoRAError unless the row files of a new stage can be read."""
    config = stage.config
    with naming(stage):
        check_files(config.data, config.train.loss)
        if isinstance(config.start_data, StartData):
            check_files(config.start_data.as_data(config.data), None)


def _warn_of_unread(stage: Stage) -> None:
    """Log keys of a new stage that change nothing with its other keys."""
    for key, why in _unread(stage.config):
        logger.warning("%s: %s has no effect %s", stage.name, key, why)


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield keys that change nothing with the other keys, and why."""
    train = config.train
    for key in () if reads_adam_keys(train.optimizer) else ("betas", "eps"):
        if getattr(train, key) != type(train).model_fields[key].default:
            yield f"train.{key}", f"on {train.optimizer}; give train.optimizer_options"
    if not config.has_validation:
        for key in ("eval_every", "select_metric"):
            if getattr(train, key) is not None:
                yield f"train.{key}", "without validation rows; give data.validation"
    elif train.compares and train.eval_every is None and len(config.chain.ranks) < 2:
        key = "keep_best" if train.keep_best else "early_stop"
        yield f"train.{key}", "on one link, evaluated at its end alone; set train.eval_every"


def _need_same(stage: Stage, begun: OpenState) -> None:
    """Raise ChainLoRAError if a begun stage differs from its config, or cannot resume."""
    if isinstance(stage.config.start_data, StartData) and START not in begun.keepers:
        raise RunError(
            "`start_data` is read when a run begins",
            f"some for {begun.run}, which keeps none",
            f"leave it out, and call chainlora eval {shlex.quote(str(begun.run))} --matrix "
            "--start-rows FILE",
        )
    compare(begun, stage.config, None if stage.name == MAIN else stage.name)
    if begun.draft is not None:
        check_plugins(begun, stage.config)


def _start_of(first: StagePlan, existing: OpenState | None) -> Start:
    """Return the start of the first stage: where it begins, or where it was begun."""
    if existing is None:
        source = first.stage.fork
        return NOTHING if source is None else load_start(source)
    if first.begun is not None:
        return start_at(first.begun.parent)
    key = existing.history.origin if first.stage.beside else first.stage.after
    return start_at(existing if key is None else existing.at(key))
