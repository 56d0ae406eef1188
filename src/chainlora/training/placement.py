"""Place the stages of a command beside the others or on top, and list the entries to declare.

A stage beside others is trained on the run's origin; a stage on top is trained on the head. Stages
beside each other are followed by one combination (docs/stages.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from chainlora.chain.adapters import matched_modules
from chainlora.chain.layerwise import outside_layers
from chainlora.config.schema import PAIR_LOSSES, LinkConfig, RunConfig
from chainlora.config.staging import Stage
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import ON_TOP, need_combinable
from chainlora.runs.declaring import stage_entry
from chainlora.runs.draft import Draft
from chainlora.runs.history import History, Unbuilt
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.loading_start import NOTHING, Start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState


@dataclass(frozen=True)
class StagePlan:
    """A stage of a command, and how far it has come."""

    stage: Stage
    begun: OpenState | None = None  # None: new
    declared: Unbuilt | None = None  # of an imported adapter, which is added like a stage

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
        """Return the step at which a stopped stage resumes."""
        return self.draft.position.step if self.draft else 0


# --- beside or on top ---


def placed(planned: Sequence[StagePlan], head: OpenState | None, start: Start) -> list[StagePlan]:
    """Return the stages of a config, each with `beside` decided.

    A begun stage keeps its place. `head` is None before the run's first stage has ended; then
    `start` is the start of that stage. Raises ChainLoRAError for a new stage that cannot be
    combined with those that it stands beside.
    """
    result = [planned[0]]
    for place, current in enumerate(planned[1:], 1):
        stage, is_beside = current.stage, current.stage.beside
        if current.begun is not None and stage.after is None:
            is_beside = _began_beside(stage, current.begun)
        elif stage.after is None and (is_beside := stands_beside(stage)):
            before = [other.stage for other in planned[:place] if other.state != "finished"]
            need_beside(stage, before, head, start)
        result.append(replace(current, stage=replace(stage, beside=is_beside)))
    return result


def stands_beside(stage: Stage) -> bool:
    """Say whether a new stage stands beside the others: by its key, else if it learns answers.

    Raises ConfigError if it reads rows of earlier stages and has no key.
    """
    data = stage.config.data
    keys = ["data.replay"] * bool(data.replay) + ["data.new_rows_only"] * data.new_rows_only
    if stage.beside is None and keys:
        rule = "a stage that reads rows of earlier stages says where it stands"
        remedy = "add --on-top, or --beside, which leaves it the rows of the start alone"
        got = f"{keys[0]} of {stage.name} without `beside`"
        raise ConfigError(rule, got, f"{remedy} (in a config: beside: false or true)")
    is_answers = learned_by(data, stage.config.train.loss) not in PAIR_LOSSES
    return is_answers if stage.beside is None else stage.beside


def need_beside(
    stage: Stage, before: Sequence[Stage], head: OpenState | None, start: Start = NOTHING
) -> None:
    """Raise ChainLoRAError for a new stage that cannot be combined with the others.

    `before` are unfinished stages of the same command. `head` and `start` are those of `placed`.
    """
    for each in (*before, stage):
        _need_keys(each)
    links = [*stage.config.chain.links()]
    if head is None:
        for link in start.links:
            need_low_rank_sum(link.config, "start", ON_TOP)
    else:
        parts = [head.at(key) for key in head.history.parts(head.key)]
        need_combinable(parts)
        links += [facts.link_config() for part in parts for facts in part.facts]
    need_in_layers(_base_of(stage, head).skeleton, links, ON_TOP)


def _base_of(stage: Stage, head: OpenState | None) -> OpenBase:
    """Return the base of a run, or the one that a stage will begin it on."""
    if head is not None:
        return OpenBase.of_state(head)
    output = stage.config.output
    return OpenBase.of_config(stage.config, None if output is None else Path(output))


def need_in_layers(skeleton: Any, links: Sequence[LinkConfig], remedy: str) -> None:
    """Raise ConfigError for links outside the decoder layers, which are not combined."""
    names = [name for link in dict.fromkeys(links) for name in matched_modules(skeleton, link)]
    if outside := outside_layers(skeleton, names):
        rule = "stages beside each other have all their links in decoder layers"
        raise ConfigError(rule, outside[0], remedy)


def _need_keys(stage: Stage) -> None:
    """Raise ConfigError for a stage with keys that prevent a combination."""
    data, chain = stage.config.data, stage.config.chain
    keys = {
        "chain.lora_bias": chain.lora_bias,
        "data.keep_rows: false": not data.keep_rows,
    }
    if wrong := [key for key, is_set in keys.items() if is_set]:
        rule = "a stage beside others is combined with them"
        got = f"{wrong[0]} of {stage.name}"
        raise ConfigError(rule, got, f"leave it out, or {ON_TOP}")


def _began_beside(stage: Stage, begun: OpenState) -> bool:
    """Say whether a begun stage stands on the origin. Raise RunError if its config contradicts."""
    is_beside = begun.parent.key == begun.history.origin
    if stage.beside not in (None, is_beside):
        rule = f"stage {stage.name!r} must stay where it was begun"
        got = "it began beside the others" if is_beside else "it began on top of others"
        raise RunError(rule, got, f"set beside: {str(is_beside).lower()}, or rename it")
    return is_beside


def need_below(head: OpenState, finished: Sequence[Stage], combined: Collection[str]) -> None:
    """Raise RunError unless the head, or what is `combined`, includes all finished stages."""
    run, history = head.run, head.history
    below = {*history.below(head.key), *combined}  # unbuilt combinations will include theirs
    if missing := [stage.name for stage in finished if stage.name not in below]:
        names = {stage.name for stage in finished}
        whole = [e.key for e in history.entries if names <= history.below(e.key)]
        raise RunError(
            f"Cannot begin a stage on {history.head}, the current state of {run}: it does not "
            f"include {missing[-1]}. Run chainlora undo {shlex.quote(str(run))} --to "
            f"{[*missing, *whole][-1]}, then repeat the command."
        )


# --- the entries to declare ---


@dataclass
class Declaring:
    """The entries of a command, collected one stage after the other."""

    history: History  # with the new entries
    run: Path
    new: list[Unbuilt] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # all entries of the command
    configs: dict[str, RunConfig] = field(default_factory=dict)  # by the key of a stage
    _group: list[Stage] = field(default_factory=list)  # beside each other, not combined yet

    def __post_init__(self) -> None:
        history = self.history
        self.before = history
        is_unbuilt = history.find_unbuilt(history.origin) is not None
        # the next stage on top begins here; in the end, the target
        self.top = self._first = history.origin if is_unbuilt else history.head
        self.keys += [history.origin] * is_unbuilt

    @property
    def target(self) -> str | None:
        """Return the future head, None if the head stays."""
        return None if self.top == self._first else self.top

    def add_all(self, planned: Sequence[StagePlan]) -> None:
        """Add stages in order; combine those beside each other before the next one on top."""
        for stage_plan in planned:
            if stage_plan.stage.beside:
                self._add_beside(stage_plan)
            else:
                self._combine()
                self._add_on_top(stage_plan)
        self._combine()

    def _add_on_top(self, planned: StagePlan) -> None:
        stage = planned.stage
        parent = self.top if stage.after is None else stage.after
        if planned.begun is not None and planned.begun.entry is not None:
            parent = planned.begun.entry.parent
        self._add(planned, parent)
        if planned.state != "finished" and parent == self.top:
            self.top = stage.name

    def _add_beside(self, planned: StagePlan) -> None:
        name = planned.name
        self._add(planned, self.history.origin)
        history = self.history
        is_parent = any(name in history.below(entry.key) for entry in history.unbuilt)
        known = (*history.entries, *history.unbuilt)
        combined = {key for entry in known if entry.kind == "combine" for key in entry.parents}
        # a finished stage is combined if no combination and not the head has it
        if is_parent or name not in combined | history.below(history.head):
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
        """Combine the stages of the group with the parts of the current or future head."""
        if not self._group:
            return
        history, last, names = self.history, self._group[-1], [s.name for s in self._group]
        self._group = []
        parts = history.without_ancestors([*history.parts(self.top), *names])
        known = [e for e in history.unbuilt if e.kind == "combine" and {*parts} <= {*e.parents}]
        if known:  # this command was stopped before, or a later command declared it
            parts = list(known[0].parents)
        elif (target := self.before.target) is not None:  # of another command, or of a replaced one
            future = [key for key in self.before.parts(target) if history.known(key) is not None]
            future = [key for key in future if not {*names} & (history.below(key) - {key})]
            parts = history.without_ancestors([*parts, *future])
        if len(parts) == 1:  # the head is still the origin: there is nothing to combine with
            self.top = parts[0]
        else:
            self._combine_parts(parts, last)

    def _combine_parts(self, parts: Sequence[str], last: Stage) -> None:
        """Declare a combination of entries.

        `last` is one of the parts. The recipe is that of the current top, with `keep_conflicts` of
        the last stage.
        """
        history, update = self.history, {"keep_conflicts": last.config.data.keep_conflicts}
        recipe = history.recipe_of(self.top).model_copy(update=update).of_parts(parts)
        known = history.combination(parts, recipe)
        if known is None:
            order = [e.key for e in (*history.entries, *history.unbuilt) if e.key in parts]
            keys: Any = {"key": history.name_after(order), "unit": last.name, "recipe": recipe}
            known = Unbuilt(kind="combine", parents=tuple(order), **keys)
            self._declare(known)
        self.keys.append(known.key)
        self.top = known.key
