"""Where a stage stands: beside the others, on what the run began on, or on top of them; and what
is due when one beside others has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.staging import Stage
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import ON_TOP, need_combinable
from chainlora.runs.draft import Draft
from chainlora.runs.history import History
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """A stage of a run, and what of it was begun before."""

    stage: Stage
    begun: OpenState | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def draft(self) -> Draft | None:
        return None if self.begun is None else self.begun.draft

    @property
    def state(self) -> Literal["finished", "stopped", "new"]:
        return "new" if self.begun is None else "stopped" if self.draft else "finished"

    @property
    def step(self) -> int:
        """Return the step that a stopped one goes on from."""
        return self.draft.position.step if self.draft else 0


# --- where it begins ---


def begins_on(now: OpenState, planned: StagePlan) -> OpenState:
    """Return the state of a run, which is `now`, that a stage begins on or has begun on."""
    if planned.begun is not None:
        return planned.begun.parent
    stage, history = planned.stage, now.history
    key = history.origin if stage.beside else stage.after
    return now if key is None else now.at(key)


def need_below(now: OpenState, ended: Sequence[Stage]) -> None:
    """Raise RunError unless these stages are in what the run is, or will be combined with it."""
    run, history = now.run, now.history
    below = {entry.key for entry in now.lineage}
    below |= {stage.name for stage in ended if is_combination_due(history, stage)}
    if missing := [stage.name for stage in ended if stage.name not in below]:
        names = {stage.name for stage in ended}
        whole = [e.key for e in history.entries if names <= {a.key for a in history.lineage(e.key)}]
        raise RunError(
            f"Cannot begin a stage on {history.head}, which {run} is now: it is without "
            f"{missing[-1]}. Run chainlora undo {run} --to {[*missing, *whole][-1]}, then the same "
            "command."
        )


def placed(planned: Sequence[StagePlan], now: OpenState | None, start: Start) -> list[StagePlan]:
    """Return the stages of a config, each beside those before it or on top of them.

    A stage that was begun stays where it was. A new one stands where its key `beside` says, by
    default beside the others if it can be combined with them and their rows are answers; else a
    warning says why. After the last of those that stand beside each other comes a rehearsal, unless
    there is no other. `now` is what the run is, None before its first stage has ended, which begins
    on `start`.

    Raises ConfigError or RunError for what was begun elsewhere, or cannot be combined.
    """
    stages = [planned[0].stage]
    for place, each in enumerate(planned[1:], 1):
        stage, is_beside = each.stage, each.stage.beside
        if each.begun is not None and stage.after is None:
            is_beside = _began_beside(stage, each.begun)
        elif stage.after is None:
            before = [other.stage for other in planned[:place] if other.state != "finished"]
            is_beside = can_stand(stage, before, now, start)
        stages.append(replace(stage, beside=is_beside))
    found, is_alone = [], len(stages) == 1 and now is not None and now.key == now.history.origin
    for each, stage, then in zip(planned, stages, [*stages[1:], None], strict=True):
        is_last = bool(stage.beside) and not is_alone and (then is None or not then.beside)
        found.append(replace(each, stage=replace(stage, rehearse=stage.rehearse and is_last)))
    return found


def can_stand(
    stage: Stage, before: Sequence[Stage], now: OpenState | None, start: Start = NOTHING
) -> bool:
    """Say whether a new stage stands beside the others; raise if it must, and cannot.

    `before` are others that have not ended, `now` is what the run is, None where it begins on
    `start`.
    """
    if stage.beside is False:
        return False
    own = {e.name: learned_by(e.config.data, e.config.train.loss) for e in (stage, *before)}
    try:
        for each in (*before, stage):
            if each is stage or not each.config.data.rehearse:
                _need_keys(each)
        if now is None:
            kept = start.kept
            for link in start.links:
                need_low_rank_sum(link.config, "start", ON_TOP)
        else:
            kept = now.kept()
            need_combinable([now.at(key) for key in now.history.ends(now.key)])
        if stage.beside is None:
            _need_answers(stage, own | {name: each.loss for name, each in kept.items()}, now)
    except (ConfigError, RunError) as error:
        if stage.beside:
            raise
        below = before[-1].name if now is None or before else now.history.head
        logger.warning("stage %s is trained on top of %s: %s", stage.name, below, error)
        return False
    return True


def _need_keys(stage: Stage) -> None:
    """Refuse a stage whose keys make it one that cannot be combined with others."""
    data, chain = stage.config.data, stage.config.chain
    keys = {
        "chain.lora_bias": chain.lora_bias,
        "data.keep_rows: false": not data.keep_rows,
        "data.rehearse": data.rehearse,
    }
    if wrong := [key for key, is_set in keys.items() if is_set]:
        rule = "a stage beside others is combined with them"
        got = f"{wrong[0]} of {stage.name}"
        raise ConfigError(rule, got, "leave it out, or train it on top")


def _need_answers(stage: Stage, losses: Mapping[str, str], now: OpenState | None) -> None:
    """Refuse a stage that builds on others: of pairs, on a mix, which a combination would undo, or
    one that reads or counts their rows. `losses` are its own and those of the others."""
    data = stage.config.data
    found = [f"{name}: {loss}" for name, loss in losses.items() if loss in PAIR_LOSSES]
    found += ["data.replay"] * bool(data.replay) + ["data.new_rows_only"] * data.new_rows_only
    if now is not None and now.entry is not None and now.entry.kind == "mix":
        found += [f"{now.entry.key}, whose strengths would be lost"]
    if found:
        rule = "by default a stage with answers of its own stands beside others"
        remedy = "--beside, or beside: true, does it all the same"
        if found[0].startswith("data."):  # a stage beside others reads nothing of them
            remedy = "leave it out to train beside them"
        raise RunError(rule, found[0], remedy)


def _began_beside(stage: Stage, begun: OpenState) -> bool:
    is_beside = begun.parent.key == begun.history.origin
    if stage.beside not in (None, is_beside):
        rule = f"stage {stage.name!r} must stay where it was begun"
        got = "it began beside the others" if is_beside else "it began on top of others"
        raise RunError(rule, got, f"set beside: {str(is_beside).lower()}, or rename it")
    return is_beside


# --- what is due when it has ended ---


def is_combination_due(history: History, stage: Stage) -> bool:
    """Say whether a stage beside others is in no combination yet, nor in what the run is."""
    return bool(stage.beside) and stage.name not in _taken_in(history, history.head)


def left_out(history: History) -> list[str]:
    """Return the stages that have ended and never were in what the run was, as after a kill."""
    inside = _taken_in(history, history.head, *history.past, *history.future)
    return [name for name in history.own_stages if name not in inside]


def _taken_in(history: History, *heads: str) -> set[str]:
    """Return what has been in a combination, and all that some entries were computed from."""
    found = {key for each in history.entries if each.kind == "combine" for key in each.parents}
    return found | {entry.key for head in heads for entry in history.lineage(head)}


def is_rehearsal_due(history: History, stage: Stage) -> bool:
    """Say whether the run is a combination with a new stage, which nothing has rehearsed."""
    now = history.find(history.head)
    if not stage.rehearse or now is None or now.kind != "combine":
        return False
    before = history.ends(history.past[-1]) if history.past else []
    is_new = stage.name in now.parents and stage.name not in before
    is_done = any(each.is_rehearsal and each.parents == (now.key,) for each in history.entries)
    return is_new and not is_done
