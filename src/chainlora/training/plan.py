"""Make the change of a command that trains: new stages in the plan of its run.

Everything that can be checked without weights is checked (`training.refusing`) before anything is
written. `--dry-run` shows the change, `training.reconcile` carries it out.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from os.path import expanduser
from pathlib import Path

from chainlora.config.schema import LENGTHS, DataConfig, RunConfig, StartData
from chainlora.config.staging import Stage
from chainlora.data.kept import keeps_general
from chainlora.data.splits import check_files, rows_of_an_epoch
from chainlora.errors import RunError
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import first_history, stage_of
from chainlora.runs.entries import START, Base
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING, Start, load_start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart, refuse_if_other, refuse_if_taken
from chainlora.runs.recipes import How, Plan
from chainlora.runs.recipes import Stage as PlannedStage
from chainlora.runs.resuming import check_plugins, need_same, need_same_start
from chainlora.runs.state import OpenState
from chainlora.training.optimizers import reads_adam_keys
from chainlora.training.processes import num_launched, wants_shards
from chainlora.training.reconcile import Change, settled
from chainlora.training.refusing import StagePlan, check_due, naming, need_beside, stands_beside

logger = logging.getLogger(__name__)

# The default length of a link: at least as many steps of 8 rows as benchmarks/small_files chose,
# and for few rows as many epochs.
STEPS, STEP_ROWS = 160, 8
FEW_ROWS, FEW_EPOCHS = 200, 10


def make_plan(
    stages: Sequence[Stage],
    *,
    resume: bool = True,
    base: OpenBase | None = None,
) -> Change:
    """Plan the stages of a command and check them; write and train nothing.

    The files of the last finished stage are verified, and those of the head, if a new stage depends
    on it. Without `resume`, an existing run in the output is refused.
    """
    # 1. Find the run, and how far each stage has come.
    run, existing = Path(), None
    if stages[0].config.output is not None:
        run = Path(expanduser(stages[0].config.output))
        need_apart(run)
        refuse_if_other(run) if resume else refuse_if_taken(run)
    known = exists_in(run) and stages[0].config.output is not None
    if known and not (history := settled(run, read_history(run))).is_blank:
        existing = state_at(run, history)
        start = NOTHING
        _need_order(existing, stages)
        need_same_start(existing, stages[0].config)
    else:
        stages = [_without_general(stages[0]), *stages[1:]]
        start = NOTHING if stages[0].fork is None else load_start(stages[0].fork)
        base_facts = Base(model=stages[0].config.model, fingerprint="")
        history = first_history(stages[0].config, base_facts, start)
    planned = [_planned(stage, existing) for stage in stages]
    finished = [p.begun for p in planned if p.begun is not None and p.draft is None]
    if finished:
        finished[-1].verify()
    # 2. Add the new stages to the plan, one version each.
    head = existing if existing is not None and _has_stage(existing) else None
    before = [*planned]
    for place, each in enumerate(planned):
        if history.plan().find(each.name) is None and each.state == "new":
            others = [other.stage for other in before[:place] if other.state != "finished"]
            planned[place], history = _with_stage(each, others, history, head, start)
    # 3. Refuse what cannot be trained.
    if existing is not None and stages[0].after is None and stages[0].fork is None:
        _need_below(existing, planned)
    configs = {each.name: each.stage.config for each in planned}
    change = Change(run, history, tuple(planned), configs, start)
    if change.due:
        if head is not None and any(each.state == "new" for each in planned):
            head.verify()
        check_due(change.stages, start, head, base)
    return change


def _stage_in(history: History, name: str) -> PlannedStage | None:
    """Return the stage of a name in the plan, or one that was undone and is there still."""
    entry = history.find(name)
    undone = None if entry is None else history.stages.get(entry.identity or "")
    return history.plan().find(name) or undone


def _need_below(head: OpenState, planned: Sequence[StagePlan]) -> None:
    """Raise RunError if new stages of a config would begin on a run without the finished ones."""
    history, place = head.history, shlex.quote(str(head.run))
    finished = [each.name for each in planned if each.state == "finished"]
    missing = [name for name in finished if name not in history.plan().active]
    if missing and any(each.state == "new" for each in planned):
        whole = [e.key for e in history.entries if {*finished} <= history.below(e.key)]
        raise RunError(
            f"Cannot begin a stage on {head.key}, the current state of {head.run}: it does not "
            f"include {missing[-1]}. Run chainlora undo {place} --to {[*missing, *whole][-1]}, "
            "then repeat the command."
        )


def _has_stage(state: OpenState) -> bool:
    return any(entry.key != START for entry in state.history.entries)


def _with_stage(
    planned: StagePlan,
    others: Sequence[Stage],
    history: History,
    head: OpenState | None,
    start: Start,
) -> tuple[StagePlan, History]:
    """Return a stage that knows where it stands, and the history with it as a new version."""
    stage = planned.stage
    is_extension = stage.after is not None or stage.fork is not None
    is_beside, is_first = bool(stage.beside), not history.plan().stages
    if not is_first and not is_extension:
        is_beside = stands_beside(stage)
    if is_beside and not is_first and not is_extension:
        need_beside(stage, others, head, start)
    plan = _with_undone(stage, history, head)
    names, how = _below(stage, plan, history, head) if not is_beside else ((), None)
    new = stage_of(stage.name, stage.config, names, how)
    new = new.model_copy(update={"default_length": stage.default_length})
    _need_free(history, new, head)
    plan = plan.with_stage(new)
    if not names:
        how = plan.how.model_copy(update={"keep_conflicts": stage.config.data.keep_conflicts})
        plan = plan.model_copy(update={"how": how})
    words = f"{'extend' if is_extension else 'train'} {stage.name}"
    planned = replace(planned, stage=replace(stage, beside=is_beside))
    return planned, history.edited(plan, words)


def _with_undone(stage: Stage, history: History, head: OpenState | None) -> Plan:
    """Return the plan, with stages that were undone if a new stage stands on them."""
    plan = history.plan()
    if stage.after not in (None, head and head.key):
        for entry in history.lineage(str(stage.after)):
            undone = history.stages.get(entry.identity or "")
            if undone is not None and plan.find(undone.name) is None:
                plan = plan.with_stage(undone)
    return plan


def _below(
    stage: Stage, plan: Plan, history: History, head: OpenState | None
) -> tuple[tuple[str, ...], How | None]:
    """Return the stages that a new one is trained on, and how they are put together."""
    if stage.after in (None, head and head.key):
        return plan.active, plan.how
    entry = history.find(str(stage.after))
    if entry is None or entry.key == START:
        return (), None
    if entry.kind == "combine":
        lineage = [each for each in history.lineage(entry.key) if each.identity is not None]
        return tuple(history.name_of(each) for each in lineage), entry.how
    return (history.name_of(entry),), None


def _need_free(history: History, new: PlannedStage, head: OpenState | None) -> None:
    """Raise RunError if the name of a new stage is that of another entry."""
    entry = history.find(new.name)
    if entry is not None:
        got = f"{new.name!r}, a {entry.kind} of {head and head.run}"
        raise RunError("a stage must have a name of its own", got, "choose another")


def _need_order(head: OpenState, stages: Sequence[Stage]) -> None:
    """Raise RunError unless a config lists the run's stages first, in their order."""
    if stages[0].after is not None or stages[0].fork is not None:  # a stage of `extend`
        return
    run, plan = head.run, head.history.plan()
    known = [stage.name for stage in plan.stages if stage.kind == "stage"]
    known = [name for name in known if name not in head.history.copied]
    ended = [entry.key for entry in head.history.entries if entry.has_config]
    if plan.stages and not known and stages[0].name not in plan.names:
        rule = "the first stage of a config begins a run"
        remedy = f"add it by chainlora extend {shlex.quote(str(run))}, or choose another output"
        raise RunError(rule, f"{run}, which has {plan.names[0]}", remedy)
    names = [s.name for s in stages if s.name in known or s.name not in (*ended, *plan.names)]
    if stages[-1].name in plan.names:
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
    known = existing and _stage_in(existing.history, stage.name)
    begun = existing and begun_stage(existing.run, stage.name, existing.history)
    if not known or existing is None:
        stage = _with_length(stage, begun)
        if begun is None:
            _need_files(stage)
            _warn_of_unread(stage)
        return StagePlan(stage)
    stage = _with_length(stage, begun)
    is_first = existing.history.plan().names[:1] == (stage.name,)
    if not is_first and stage.beside is not None and stage.beside == bool(known.names):
        rule = f"stage {stage.name!r} must stay where it was begun"
        got = "it began on top of others" if known.names else "it began beside the others"
        is_beside = str(not known.names).lower()
        raise RunError(rule, got, f"set beside: {is_beside}, or choose another name by --name")
    need_same(existing, known, stage.config, has_ended=begun is not None and begun.draft is None)
    if begun is not None and begun.draft is not None:
        check_plugins(known, existing.run, stage.config)
    return StagePlan(replace(stage, beside=not known.names), begun)


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
    return replace(stage, config=config, default_length=True)


def default_epochs(data: DataConfig) -> float:
    """Return the epochs of a link without a length: one, or as many as the constants above say."""
    rows = rows_of_an_epoch(data, STEPS * STEP_ROWS)
    epochs = ceil(STEPS / ceil(rows / STEP_ROWS))
    return float(max(epochs, FEW_EPOCHS) if rows <= FEW_ROWS else epochs)


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
