"""What one more stage of a run is: its config, and what it begins on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, count
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.config.chain_keys import LENGTHS
from chainlora.config.reading import set_key
from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.staging import (
    Stage,
    check_name,
    is_run,
    make_stage,
    not_inherited,
    section_of,
    split_address,
    what_stages_share,
)
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import need_combinable
from chainlora.models.finding import from_above
from chainlora.runs.addresses import find_state
from chainlora.runs.draft import drafts_in, read_draft
from chainlora.runs.history import BASE
from chainlora.runs.locks import refuse_links
from chainlora.runs.resuming import not_named
from chainlora.runs.state import OpenState
from chainlora.training.plan import begun_stage

logger = logging.getLogger(__name__)

REHEARSAL, STEPS = "rehearsal", 40


def extension(
    address: str | Path,
    section: Mapping[str, Any],
    overrides: Sequence[tuple[str, Any]] = (),
    *,
    beside: bool | None = False,
    rehearse: bool = False,
) -> list[Stage]:
    """Return one more stage of a run, which `section` and `overrides` describe.

    It begins on the state that `address` names: what the run is now, or another of its states.
    With `beside` it begins on what the run began on, and is then combined with what the run is
    (`evaluation.combination`) and, with `rehearse`, rehearsed. None chooses (`extend`).

    Other keys are inherited from the stage before, with `beside` from the run's first, but for its
    rows, its links and their lengths, and how its end was chosen; a warning names what it had set
    and they do not. With `output` it is a fork: a run that begins on the state that `address`
    names, whose files stay as they are.

    Raises:
        ConfigError: a stage without a name, or with keys that a stage cannot have.
        RunError: a stage that was begun on another state, or before the first has ended.
    """
    run, named = split_address(address)
    now, state = find_state(run), find_state(address)
    if not now.has_run:
        raise RunError(
            "a stage is added to a run",
            f"a saved chain, {run}",
            f"begin a run on it, by start: {run} in its config",
        )
    own = {key: value for key, value in section.items() if key != "output"}
    for key, value in overrides:
        set_key(own, key, value)
    output = own.pop("output", section.get("output"))
    plugins = own.pop("plugins", None)
    name = check_name(own.get("name"))
    begun = Path(expanduser(output)) if output is not None else run
    is_chosen = beside is not None
    if beside is None:
        known = begun_stage(run, name)
        beside = output is None and named is None
        beside &= known is None or _began_on(known) == now.history.origin
    if beside:
        if output is not None or state.state != now.state:
            rule, remedy = "a stage beside others begins where RUN began", "leave one out"
            raise RunError(rule, f"--beside with {output or address}", remedy)
        state = now.at(now.history.origin)
    if output is None:
        refuse_links(run)
        state = _below(run, state, now, name)
    last = _stage_before(state)
    if beside:  # not from a stage that may be pruned, or not there when the command is given again
        last = begun_stage(run, name) or now.at(now.history.own_stages[0])
    before, is_new = last.config(), not is_run(begun) or begun_stage(begun, name) is None
    if plugins is None and before.plugins:
        raise RunError(not_named(f"extend {address}", before.plugins) + ", or --plugins [] without")
    shared = what_stages_share(before) | {"plugins": plugins or ()}
    if beside and is_new:
        stage = make_stage(shared | {"output": str(run)}, own, 1)
        try:
            _need_combinable(now, stage)
            if not is_chosen:
                _need_answers(now, stage)
        except (ConfigError, RunError) as error:
            if is_chosen:
                raise
            logger.warning("stage %s is trained on top of %s: %s", name, now.history.head, error)
            return extension(address, section, overrides)
    is_rehearsal = section_of(own, "data").get("rehearse", False)
    if is_new and not is_rehearsal and (left_out := not_inherited(before, own)):
        what = (name, ", ".join(left_out), last.stage)
        logger.warning("stage %s does not inherit %s from %s", *what)
    if output is not None:
        base = from_above(shared["model"], run)
        tree = shared | {"model": base, "start": str(address), "output": str(output)}
        return [make_stage(tree, own, 0)]
    stage = make_stage(shared | {"output": str(run)}, own, 1)
    key = "base" if state.entry is None else state.entry.key
    rehearse &= beside
    return [Stage(stage.name, stage.config, after=key, beside=beside, rehearse=rehearse)]


def rehearsal(
    run: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return a short stage on rows that all stages of a run kept, as many of each (`rehearse`).

    A rehearsal of what the run is that was stopped goes on; one that it ended in is returned.
    """
    now = find_state(run)
    drafts = {name: read_draft(now.run, name).entry for name in drafts_in(now.run, now.history)}
    head = now.history.head
    on_now = [entry for entry in drafts.values() if (entry.parents or (BASE,)) == (head,)]
    on_now += [] if now.entry is None else [now.entry]
    begun = [entry.key for entry in on_now if entry.is_rehearsal]
    taken = {*drafts, *(entry.key for entry in now.history.entries)}
    numbered = (f"{REHEARSAL}-{number}" for number in count(2))
    free = (name for name in chain([REHEARSAL], numbered) if name not in taken)
    own = {"name": begun[0] if begun else next(free)} | dict(section)
    for key, value in overrides:
        set_key(own, key, value)
    rows = {"rehearse": True, "replay": None, "new_rows_only": False}
    own["data"] = rows | section_of(own, "data")
    given, largest = section_of(own, "chain"), max((facts.rank for facts in now.facts), default=8)
    length = {} if given.keys() & {*LENGTHS} else {"steps": [STEPS]}
    own["chain"] = {"ranks": [largest]} | length | given
    own["train"] = {"loss": None} | section_of(own, "train")  # not on pairs
    return extension(run, own)


def _need_combinable(now: OpenState, stage: Stage) -> None:
    """Refuse a stage that could not be combined with what the run is."""
    chain = stage.config.chain
    keys = {
        "chain.dora": chain.dora,
        "chain.lora_bias": chain.lora_bias,
        "chain.extra_modules": bool(chain.extra_modules),
        "data.keep_rows: false": not stage.config.data.keep_rows,
        "train.accept_links": stage.tolerance is not None,
    }
    if wrong := [key for key, is_set in keys.items() if is_set]:
        rule = "a stage beside others is combined with them"
        raise ConfigError(rule, wrong[0], "leave it out, or train it on top")
    need_combinable([now.at(key) for key in now.history.ends(now.history.head)])


def _need_answers(now: OpenState, stage: Stage) -> None:
    """Refuse a stage that builds on others: of pairs, on a mix, which a combination would undo, or
    one that reads or counts their rows."""
    data, loss = stage.config.data, learned_by(stage.config.data, stage.config.train.loss)
    of_pairs = {stage.name: loss} | {name: kept.loss for name, kept in now.kept().items()}
    found = [f"{name}: {loss}" for name, loss in of_pairs.items() if loss in PAIR_LOSSES]
    found += ["data.replay"] * bool(data.replay) + ["data.new_rows_only"] * data.new_rows_only
    if now.entry is not None and now.entry.kind == "mix":
        found += [f"{now.entry.key}, whose strengths would be lost"]
    if found:
        rule = "by default a stage with answers of its own stands beside others"
        remedy = "--beside does it all the same"
        raise RunError(rule, found[0], remedy)


def _began_on(stage: OpenState) -> str:
    """Return the entry that a stage was begun on."""
    parents = () if stage.entry is None else stage.entry.parents
    return parents[0] if parents else BASE


def _stage_before(state: OpenState) -> OpenState:
    """Return the end of the stage that another one inherits from: not of a rehearsal."""
    found = [e.key for e in state.lineage if e.kind == "stage" and not e.is_rehearsal]
    return state.at(found[-1]) if found and state.draft is None else state


def _below(run: Path, state: OpenState, now: OpenState, name: str) -> OpenState:
    """Return the state that a stage of a run begins on, or has begun on."""
    if now.draft is not None:
        rule = "a stage is added to a run whose first stage has ended"
        raise RunError(rule, run, "finish it by the command that began it")
    begun = begun_stage(run, name)
    if begun is not None and begun.entry is not None:
        if begun.entry.kind != "stage":
            rule = "a stage must have a name of its own"
            raise RunError(rule, f"{name!r}, a {begun.entry.kind} of {run}", "choose another")
        below = begun.at(_began_on(begun))
        if state.state != below.state and state.state != now.state:
            rule = f"stage {name!r} must go on from where it was begun"
            raise RunError(rule, f"{state}, and {below}", "name that, or another stage")
        return below
    return state
