"""Where the stages of a command stand, and the entries that are declared for them.

A stage stands beside the others, on what the run began on, or on top of them. After the last of
those beside each other comes their combination, and a rehearsal of that.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.config.staging import Stage
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import ON_TOP, need_combinable
from chainlora.runs.declaring import stage_entry
from chainlora.runs.draft import Draft
from chainlora.runs.history import History, Recipe, Unbuilt
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState
from chainlora.training.rehearsing import largest_rank, rehearsal_name, rehearsal_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """A stage of a run, and what of it was begun before; `declared` is an adapter that is added
    like one."""

    stage: Stage
    begun: OpenState | None = None
    declared: Unbuilt | None = None

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


# --- beside or on top ---


def placed(planned: Sequence[StagePlan], now: OpenState | None, start: Start) -> list[StagePlan]:
    """Return the stages of a config, each beside those before it or on top of them.

    A stage that was begun stays where it was. A new one stands where its key `beside` says, by
    default beside the others if it can be combined with them and their rows are answers; else a
    warning says why. `now` is what the run is, None before its first stage has ended, which begins
    on `start`.

    Raises ConfigError or RunError for what was begun elsewhere, or cannot be combined.
    """
    found = [planned[0]]
    for place, each in enumerate(planned[1:], 1):
        stage, is_beside = each.stage, each.stage.beside
        if each.begun is not None and stage.after is None:
            is_beside = _began_beside(stage, each.begun)
        elif stage.after is None:
            before = [other.stage for other in planned[:place] if other.state != "finished"]
            is_beside = can_stand(stage, before, now, start)
        found.append(replace(each, stage=replace(stage, beside=is_beside)))
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


def need_below(now: OpenState, ended: Sequence[Stage], due: Collection[str]) -> None:
    """Raise RunError unless these stages are in what the run is, or among those that are `due` to
    be combined with it."""
    run, history = now.run, now.history
    below = {*history.below(now.key), *due}
    if missing := [stage.name for stage in ended if stage.name not in below]:
        names = {stage.name for stage in ended}
        whole = [e.key for e in history.entries if names <= history.below(e.key)]
        raise RunError(
            f"Cannot begin a stage on {history.head}, which {run} is now: it is without "
            f"{missing[-1]}. Run chainlora undo {run} --to {[*missing, *whole][-1]}, then the same "
            "command."
        )


# --- what is declared for them ---


@dataclass
class Declaring:
    """The entries of a command: those that are `new`, and by `keys` all that it is about, with the
    `configs` of its stages. `history` has the new ones too.

    `top` is what a stage on top of the others stands on, and in the end what the run is to become.
    """

    history: History
    run: Path
    new: list[Unbuilt] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    configs: dict[str, RunConfig] = field(default_factory=dict)
    _group: list[Stage] = field(default_factory=list)  # beside each other, not combined yet

    def __post_init__(self) -> None:
        history = self.history
        self.before = history
        is_due = history.find_unbuilt(history.origin) is not None
        self.top = self._first = history.origin if is_due else history.head
        self.keys += [history.origin] * is_due

    @property
    def target(self) -> str | None:
        """Return what the run is to become, None where it is that already."""
        return None if self.top == self._first else self.top

    def add_all(self, planned: Sequence[StagePlan]) -> None:
        for each in planned:
            if each.stage.beside:
                self._add_beside(each)
            else:
                self._combine()
                self._add_on_top(each)
        self._combine()

    def _add_on_top(self, planned: StagePlan) -> None:
        stage = planned.stage
        on = self.top if stage.after is None else stage.after
        if planned.begun is not None and planned.begun.entry is not None:
            on = planned.begun.entry.parent
        self._add(planned, on)
        if planned.state != "finished" and on == self.top:
            self.top = stage.name

    def _add_beside(self, planned: StagePlan) -> None:
        name = planned.name
        self._add(planned, self.history.origin)
        is_awaited = any(name in self.history.below(each.key) for each in self.history.unbuilt)
        if is_awaited or is_combination_due(self.history, planned.stage):
            self._group.append(planned.stage)

    def _add(self, planned: StagePlan, parent: str) -> None:
        name, config = planned.name, planned.stage.config
        self.keys.append(name)
        self.configs[name] = config
        if planned.state == "new":
            entry = planned.declared or stage_entry(name, config, parent, name)
            if entry != self.history.find_unbuilt(name):
                self._declare(entry)

    def _declare(self, entry: Unbuilt) -> None:
        self.new.append(entry)
        self.history = self.history.declared([entry], None)

    def _combine(self) -> None:
        """Combine the stages of the group with what the run is, or is about to be."""
        if not self._group:
            return
        history, last, names = self.history, self._group[-1], [each.name for each in self._group]
        self._group = []
        parts = history.outer([*history.ends(self.top), *names])
        known = [e for e in history.unbuilt if e.kind == "combine" and {*parts} <= {*e.parents}]
        if known:  # by this command when it was given before, or by one that came later
            parts = list(known[0].parents)
        elif (target := self.before.target) is not None:  # of another command, or of a replaced one
            ahead = [key for key in self.before.ends(target) if history.known(key) is not None]
            ahead = [key for key in ahead if not {*names} & (history.below(key) - {key})]
            parts = history.outer([*parts, *ahead])
        if len(parts) == 1:  # the run is no more than what the stage began on
            self.top = parts[0]
        else:
            self.combine(parts, last)

    def combine(self, parts: Sequence[str], last: Stage, recipe: Recipe | None = None) -> None:
        """Combine entries, one of them the `last` stage, and rehearse that if the stage says so.

        By default they are combined as what the run is, with conflicts as the last stage says.
        """
        history, keeps = self.history, {"keep_conflicts": last.config.data.keep_conflicts}
        recipe = recipe or history.recipe_of(self.top).model_copy(update=keeps)
        recipe = recipe.of_parts(parts)
        known = history.combination(parts, recipe)
        if known is None:
            order = [e.key for e in (*history.entries, *history.unbuilt) if e.key in parts]
            key = history.name_after(order)
            known = Unbuilt(
                key=key, kind="combine", parents=tuple(order), unit=last.name, recipe=recipe
            )
            self._declare(known)
        self.keys.append(known.key)
        self.top = known.key
        if last.rehearse:
            self._rehearse(last, known.unit)

    def _rehearse(self, last: Stage, unit: str) -> None:
        """Let a rehearsal follow the combination."""
        history, on = self.history, (self.top,)
        known = (*history.entries, *history.unbuilt)
        name = next((e.key for e in known if e.is_rehearsal and e.parents == on), None)
        if name is None:
            name = rehearsal_name(history)
            own = {"name": name, "plugins": [*last.config.plugins]}
            stage = rehearsal_of(last.config, own, self._largest_rank(), self.run)
            self.configs[name] = stage.config
            self._declare(stage_entry(name, stage.config, self.top, unit))
        self.keys.append(name)
        self.top = name

    def _largest_rank(self) -> int:
        parts = self.history.ends(self.top)
        due = [self.configs[key].chain.ranks for key in parts if key in self.configs]
        return max([largest_rank(self.history, parts), *chain(*due)])


def is_combination_due(history: History, stage: Stage) -> bool:
    """Say whether a stage beside others is in no combination, and not in what the run is."""
    known = (*history.entries, *history.unbuilt)
    combined = {key for each in known if each.kind == "combine" for key in each.parents}
    return bool(stage.beside) and stage.name not in combined | history.below(history.head)
