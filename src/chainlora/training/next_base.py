"""Train every stage of a run again on another base: ``train RUN --model NEW --output NEW-RUN``.

The new run gets the plan of the old one. Its stages are trained on their own files, which must have
the contents that they had, and combined as before. Adapters that were added belong to the old base,
so they are left out, with the stages on top of them.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage as PlannedStage
from chainlora.errors import RunError
from chainlora.runs.addresses import state_at
from chainlora.runs.changes import whole_run
from chainlora.runs.declaring import config_of, first_history, stage_of
from chainlora.runs.entries import Base
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING
from chainlora.runs.locks import writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, need_apart, refuse_if_other
from chainlora.runs.recipes import Plan, Stage
from chainlora.runs.resuming import need_pinned, not_named, source_digests
from chainlora.runs.state import OpenState
from chainlora.training.events import Listener
from chainlora.training.reconcile import Change, settled
from chainlora.training.refusing import StagePlan, check_due, naming
from chainlora.training.stages import build_and_score

logger = logging.getLogger(__name__)


def train_on(
    run: str | Path, model: str, output: str | Path, *, listener: Listener | None = None
) -> OpenState:
    """Train the stages of a run again on the base `model`, as the new run `output`.

    Raises RunError for changed files, plug-ins, a run of adapters alone, and an `output` that is
    another run; ChainLoRAError for everything that `train` refuses. Repeat a call that was stopped
    to resume it.
    """
    source, target = whole_run(run), Path(output).expanduser()
    need_apart(target)
    refuse_if_other(target)
    with writing(target):
        change = _change(source, model, target)
        config = next(iter(change.configs.values()))
        base = OpenBase.of_config(config, target if exists_in(target) else None)
        if not exists_in(target):
            planned = [StagePlan(PlannedStage(k, c)) for k, c in change.configs.items()]
            check_due(planned, NOTHING, None, base)
        build_and_score(change, listener or (lambda event: None), base)
    return state_at(target, read_history(target))


def _change(source: Path, model: str, target: Path) -> Change:
    """Return the change that makes the new run. Raises RunError if its files have changed."""
    history = read_history(source)
    plan = _without_adapters(source, history.plan())
    configs, new = dict[str, RunConfig](), list[Stage]()
    for stage in plan.stages:
        config = configs[stage.name] = _moved(
            source, history, stage, model=model, output=str(target)
        )
        with naming(PlannedStage(stage.name, config)):
            need_pinned(source, stage.name, stage.sources, source_digests(config))
        moved = stage_of(stage.name, config, stage.names, stage.how)
        update = {"draws": stage.draws, "default_length": stage.default_length}
        new.append(moved.model_copy(update=update))
    wanted = plan.model_copy(update={"stages": tuple(new)})
    if exists_in(target):
        known = settled(target, read_history(target))
        if not known.is_blank:
            _need_same_plan(known, wanted, target)
            return Change(target, known, configs=configs)
    first = configs[new[0].name]
    history = first_history(first, Base(model=model, fingerprint=""), NOTHING)
    new_version = history.edited(wanted, f"train {shlex.quote(source.name)}")
    return Change(target, new_version, configs=configs)


def _without_adapters(source: Path, plan: Plan) -> Plan:
    """Return the plan without added adapters and the stages on them, which are named."""
    gone = plan.standing_on([stage.name for stage in plan.stages if stage.kind == "import"])
    if gone:
        logger.warning(
            "%s: left out, an adapter of the old base, or on top of one", ", ".join(gone)
        )
    plan = plan.without(gone)
    if not plan.stages:
        rule = f"Cannot train {source} on another base: it has no stage that was trained here"
        raise RunError(f"{rule}. Add adapters of the new base: chainlora add.")
    if plugins := [name for stage in plan.stages for name in stage.plugins]:
        raise RunError(not_named(f"train {source}", plugins))
    return plan


def _moved(source: Path, history: History, stage: Stage, **keys: str) -> RunConfig:
    """Return the config of a stage on the new base, without trackers, which are named again."""
    train = stage.config.get("train", {}) | {"trackers": []}
    return config_of(source, stage, train=train, start_data=_general_of(history), **keys)


def _general_of(history: History) -> Any:
    return "none" if history.general is None else history.general.get("start_data")


def _need_same_plan(known: History, wanted: Plan, target: Path) -> None:
    """Raise RunError unless a run has the wanted plan already."""
    if [s.identity for s in known.plan(1).stages] != [s.identity for s in wanted.stages]:
        rule = "`output` must be new, or the same run on the same base"
        raise RunError(rule, f"another plan in {target}", "choose another output")
