"""Where a stage stands: beside the others, on what the run began on, or on top of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.staging import Stage
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import need_combinable, need_low_rank_sum
from chainlora.runs.start import NOTHING, Start
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)


def placed(
    stages: Sequence[Stage], begun: Mapping[str, OpenState], now: OpenState | None, start: Start
) -> list[Stage]:
    """Return the stages of a config, each beside those before it or on top of them.

    A stage that was begun stays where it was. A new one stands where its key `beside` says, by
    default beside the others if it can be combined with them and their rows are answers; else a
    warning says why. After the last of those that stand beside each other comes a rehearsal. `now`
    is what the run is, None before its first stage has ended, which begins on `start`.

    Raises ConfigError or RunError for what was begun elsewhere, or cannot be combined.
    """
    found: list[Stage] = [*stages[:1]]
    ended = {name for name, state in begun.items() if state.draft is None}
    for stage in stages[1:]:
        if stage.after is not None:
            found.append(stage)
            continue
        known, new = begun.get(stage.name), [each for each in found if each.name not in ended]
        is_beside = _began_beside(stage, known) if known else can_stand(stage, new, now, start)
        found.append(replace(stage, beside=is_beside))
    after = [*(each.beside for each in found[1:]), False]
    return [
        replace(each, rehearse=bool(each.beside and each.rehearse and not then))
        for each, then in zip(found, after, strict=True)
    ]


def can_stand(
    stage: Stage, before: Sequence[Stage], now: OpenState | None, start: Start = NOTHING
) -> bool:
    """Say whether a new stage stands beside the others; raise if it must, and cannot.

    `before` are others that have not ended, `now` is what the run is, None where it begins on
    `start`.
    """
    if stage.beside is False:
        return False
    try:
        for each in (*before, stage):
            if each is stage or not each.config.data.rehearse:
                _need_combinable(each)
        for link in start.links if now is None else ():
            need_low_rank_sum(link, "start")
        if now is not None:
            need_combinable([now.at(key) for key in now.history.ends(now.history.head)])
        if stage.beside is None:
            kept = start.kept if now is None else now.kept()
            losses = {name: each.loss for name, each in kept.items()}
            own = {e.name: learned_by(e.config.data, e.config.train.loss) for e in before}
            _need_answers(stage, losses | own, now)
    except (ConfigError, RunError) as error:
        if stage.beside:
            raise
        below = before[-1].name if now is None or before else now.history.head
        logger.warning("stage %s is trained on top of %s: %s", stage.name, below, error)
        return False
    return True


def _need_combinable(stage: Stage) -> None:
    """Refuse a stage that cannot be combined with others."""
    data, chain = stage.config.data, stage.config.chain
    keys = {
        "chain.dora": chain.dora,
        "chain.lora_bias": chain.lora_bias,
        "chain.extra_modules": bool(chain.extra_modules),
        "data.keep_rows: false": not data.keep_rows,
        "data.rehearse": data.rehearse,
        "train.accept_links": stage.tolerance is not None,
    }
    if wrong := [key for key, is_set in keys.items() if is_set]:
        rule = "a stage beside others is combined with them"
        got = f"{wrong[0]} of {stage.name}"
        raise ConfigError(rule, got, "leave it out, or train it on top")


def _need_answers(stage: Stage, losses: Mapping[str, str], now: OpenState | None) -> None:
    """Refuse a stage that builds on others: of pairs, on a mix, which a combination would undo, or
    one that reads or counts their rows. `losses` are those of the others."""
    data = stage.config.data
    losses = {stage.name: learned_by(data, stage.config.train.loss), **losses}
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
    is_beside = begun.entry is not None and begun.entry.parent == begun.history.origin
    if stage.beside not in (None, is_beside):
        rule = f"stage {stage.name!r} must stay where it was begun"
        got = "it began beside the others" if is_beside else "it began on top of others"
        raise RunError(rule, got, f"set beside: {str(is_beside).lower()}, or rename it")
    return is_beside
