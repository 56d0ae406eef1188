"""`chainlora.train`, `chainlora.extend`, and the stages of a run, which they train.

What has ended is verified, what is new is trained, judged and scored. Each stage is trained by the
loop of a plain run, on the state that the run is now. So what holds for a run holds inside a stage:
kills, resume to the same bits, the best point, early stop. The same call again goes on where the
last one was stopped, and does nothing where all is done.
"""

from __future__ import annotations

import logging
import shlex
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from os.path import expanduser
from pathlib import Path
from typing import Any, cast

from chainlora.chain.showing import Shown
from chainlora.config.chain_keys import LENGTHS
from chainlora.config.reading import make_config, read_config, set_key
from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.config.staging import (
    Stage,
    check_alone,
    check_name,
    has_stages,
    is_run,
    make_stage,
    make_stages,
    not_inherited,
    section_of,
    split_address,
    what_stages_share,
)
from chainlora.data.splits import learned_by
from chainlora.errors import ConfigError, RunError, StoppedError
from chainlora.evaluation.combination import combine_with, need_combinable
from chainlora.evaluation.stage_scores import Progress, stage_matrix
from chainlora.evaluation.strengths import guard
from chainlora.models.finding import from_above
from chainlora.runs.addresses import find_state, state_of_draft
from chainlora.runs.draft import drafts_in, read_draft
from chainlora.runs.history import BASE, read_history
from chainlora.runs.loading_start import start_at, with_start
from chainlora.runs.locks import refuse_links
from chainlora.runs.resuming import not_named
from chainlora.runs.state import OpenState
from chainlora.runs.work import Work
from chainlora.training.events import Event, KeptRowsRead, Listener, StageBegins, StageGuarded
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import train as run_training
from chainlora.training.loop import train_stage
from chainlora.training.plan import StagePlan, begun_stage, make_plan, naming, need_below
from chainlora.training.processes import is_first_launched, num_launched, wait_for_all
from chainlora.training.progress import progress_listener
from chainlora.training.result import TrainResult, needs_judgement, result_of

logger = logging.getLogger(__name__)

REHEARSAL, STEPS = "rehearsal", 40


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    change: Collection[str] = (),
    progress: bool | None = None,
) -> TrainResult:
    """Run a config from data to result and return what ``result.json`` holds.

    Args:
        config: a config, the path of a YAML file, or a mapping of its keys. One with `stages`
            trains those that are new, and gives the result of the last one.
        resume: resume a run in `output` that was stopped or killed, to the same bits, and return
            the result of one that has ended; where no run is, begin. Without, a run in `output` is
            refused. Stages always resume.
        listener: gets every event (`training.events`): `Planned` before the first step, and before
            it `RowsEncoded` while a large data set is tokenised.
        change: keys that a resume may change (`runs.resuming.CHANGEABLE`).
        progress: whether to show it on stderr: a bar on a terminal, lines in a notebook or a log
            file. None: unless there is a listener.

    Everything that can be refused is refused before training. Raises ChainLoRAError subclasses.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    if isinstance(config, RunConfig) and has_stages(dict(config)):
        config = config.model_dump(mode="json")
    if isinstance(config, Mapping) and has_stages(config):
        stages = make_stages(with_start(config))
        return _of_stages(stages, listener, change, progress)
    checked = check_alone(config if isinstance(config, RunConfig) else make_config(config))
    with _shown(listener, progress) as tell:
        found = run_training(checked, resume=resume, listener=tell, change=change)
    return cast(TrainResult, Shown(found))


def extend(
    run: str | Path,
    stage: Mapping[str, Any],
    *,
    beside: bool | None = None,
    rehearse: bool = True,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train one more stage of a run, and return what its ``result.json`` holds.

    With `beside` it begins on what the run began on, and is then combined with what the run is
    (`combine`), and with `rehearse` rehearsed (`rehearse`). Without, it begins on what `run` names:
    what the run is now, or ``RUN@STAGE``. By default it stands beside the others if their rows are
    answers, and on top of a named state, for pairs, with `data.replay` or `data.new_rows_only`, and
    where a combination is not possible; a warning says why.

    `stage` has a `name`, and the sections data, chain and train; what it leaves open is as in the
    stage before, but for rows, ranks, lengths and how the end is chosen: a warning names those keys
    of the stage before. With `output` it becomes a fork that begins on `run`. The same call again
    goes on where it was stopped.
    """
    stages = extension(run, stage, beside=beside, rehearse=rehearse)
    return _of_stages(stages, listener, (), progress)


def rehearse(
    run: str | Path,
    stage: Mapping[str, Any] | None = None,
    *,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a short stage on rows that all stages of a run kept, as many of each.

    `stage` may have sections of a stage, by default one link of `STEPS` steps and the largest rank
    of the run's links. The same call again goes on where it was stopped; where the run ends in a
    rehearsal, it does nothing. Returns what ``result.json`` holds.
    """
    return _of_stages(rehearsal(run, stage or {}), listener, (), progress)


def _of_stages(
    stages: Sequence[Stage],
    listener: Listener | None,
    change: Collection[str],
    progress: bool | None,
) -> TrainResult:
    """Train what is new, and return the last stage's result."""
    with _shown(listener, progress) as tell:
        last = train_stages(stages, listener=tell, change=change)[len(stages) - 1]
    found = last or result_of(stages[-1].config, stages[-1].name)
    return cast(TrainResult, Shown(found))


@contextmanager
def _shown(listener: Listener | None, progress: bool | None) -> Iterator[Listener]:
    """Give what tells the listener, and shows progress where it is wanted."""
    is_shown = (listener is None) if progress is None else progress
    is_shown &= is_first_launched()
    with progress_listener() if is_shown else nullcontext(lambda event: None) as show:

        def tell(event: Event) -> None:
            show(event)
            if listener is not None:
                listener(event)

        yield tell


# --- stages ---


def train_stages(
    stages: Sequence[Stage],
    *,
    listener: Listener | None = None,
    change: Collection[str] = (),
    matrix: bool = True,
) -> list[TrainResult | None]:
    """Train what is new of the stages of a run; return a result for each, None of what had ended,
    and that of a rehearsal after them.

    `change` names keys that the resume of a stopped stage may change
    (`runs.resuming.CHANGEABLE`). With `matrix`, the rows that stages kept are scored in the states
    where they were not yet (`evaluation.stage_scores`).

    Raises RunError where a stage that has ended is another one now, and what `train` raises.
    """
    tell = listener or (lambda event: None)
    plan = make_plan(stages, change)
    run, results = Path(stages[0].config.output or ""), list[TrainResult | None]()
    for planned in plan.stages:
        tell(StageBegins(planned.step, planned.name, planned.state, planned.stage.beside))
        if planned.state == "finished":
            Work(run, planned.name, writes=is_first_launched()).tidy()
            results.append(None)
            if planned.stage.beside and is_first_launched():  # a kill may have come before
                _take_in(run, planned.stage, tell)
            continue
        start = plan.start
        if planned is not plan.due[0]:
            before = [each.name for each in plan.stages[: plan.stages.index(planned)]]
            need_below(run, read_history(run), before)
            start = start_at(find_state(run))
        with naming(planned.stage):
            results.append(train_stage(planned, start, tell, change=change))
        if is_first_launched():
            _judge(run, planned, tell)
        wait_for_all()
        if is_first_launched():
            _take_in(run, planned.stage, tell)
    wait_for_all()
    if stages[-1].rehearse and _is_rehearsal_due(run, stages[-1].name):
        named = {"plugins": [*stages[-1].config.plugins]}
        results += train_stages(rehearsal(run, named), listener=listener, matrix=False)
    if matrix and is_first_launched():
        state = find_state(run)
        if len(state.columns) > 1 and state.keepers():
            stage_matrix(run, progress=_reader(tell))
    wait_for_all()
    return results


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
    run, _ = split_address(address)
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
        beside = output is None and state.state == now.state
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
    is_rehearsal = section_of(own, "data").get("rehearse", False)
    if is_new and not is_rehearsal and (left_out := not_inherited(before, own)):
        what = (name, ", ".join(left_out), last.stage)
        logger.warning("stage %s does not inherit %s from %s", *what)
    if plugins is None and before.plugins:
        raise RunError(not_named(f"extend {address}", before.plugins) + ", or --plugins [] without")
    shared = what_stages_share(before) | {"plugins": plugins or ()}
    if output is not None:
        base = from_above(shared["model"], run)
        tree = shared | {"model": base, "start": str(address), "output": str(output)}
        return [make_stage(tree, own, 0)]
    stage = make_stage(shared | {"output": str(run)}, own, 1)
    key = "base" if state.entry is None else state.entry.key
    if beside and is_new:
        try:
            _need_combinable(now, stage)
            if not is_chosen:
                _need_answers(now, stage)
        except (ConfigError, RunError) as error:
            if is_chosen:
                raise
            logger.warning("stage %s is trained on top of %s: %s", name, now.stage, error)
            return extension(address, section, overrides)
    rehearse &= beside
    return [Stage(stage.name, stage.config, after=key, beside=beside, rehearse=rehearse)]


def rehearsal(
    run: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return a short stage on rows that all stages of a run kept, as many of each (`rehearse`).

    A rehearsal that was stopped goes on; one that the run ended in is returned.
    """
    now = find_state(run)
    drafts = [read_draft(now.run, name).entry for name in drafts_in(now.run, now.history)]
    known = drafts if now.entry is None else [*drafts, now.entry]
    begun = [entry.key for entry in known if entry.is_rehearsal]
    numbered = (f"{REHEARSAL}-{number}" for number in count(2))
    free = (name for name in chain([REHEARSAL], numbered) if now.history.find(name) is None)
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
    """Refuse a stage that builds on others: of pairs, or one that reads or counts their rows."""
    data, loss = stage.config.data, learned_by(stage.config.data, stage.config.train.loss)
    of_pairs = {stage.name: loss} | {name: kept.loss for name, kept in now.kept().items()}
    found = [f"{name}: {loss}" for name, loss in of_pairs.items() if loss in PAIR_LOSSES]
    found += ["data.replay"] * bool(data.replay) + ["data.new_rows_only"] * data.new_rows_only
    if found:
        rule, remedy = "stages beside each other learn answers", "for that all the same: --beside"
        raise RunError(rule, found[0], remedy)


def _began_on(stage: OpenState) -> str:
    """Return the entry that a stage was begun on."""
    parents = () if stage.entry is None else stage.entry.parents
    return parents[0] if parents else BASE


def _is_rehearsal_due(run: Path, name: str) -> bool:
    """Say whether a run is a combination of a stage that nothing has rehearsed."""
    history = read_history(run)
    now = history.find(history.head)
    if now is None or now.kind != "combine" or name not in now.parents:
        return False
    return not any(each.is_rehearsal and each.parents == (now.key,) for each in history.entries)


def _stage_before(state: OpenState) -> OpenState:
    """Return the end of the stage that another one inherits from: not of a rehearsal."""
    found = [e.key for e in state.lineage if e.kind == "stage" and not e.is_rehearsal]
    return state.at(found[-1]) if found and state.draft is None else state


def _below(run: Path, state: OpenState, now: OpenState, name: str) -> OpenState:
    """Return the state that a stage of a run begins on, or has begun on."""
    begun = begun_stage(run, name)
    if begun is not None and begun.entry is not None:
        if begun.entry.kind != "stage" or begun.entry.key in now.history.own_stages[:1]:
            rule = "an extension must come after a stage"
            raise RunError(rule, f"{name!r}, the first", "rename it")
        below = begun.at(_began_on(begun))
        if state.state != below.state and state.state != now.state:
            rule = f"stage {name!r} must go on from where it was begun"
            raise RunError(rule, f"{state}, and {below}", "name that, or another stage")
        return below
    if now.draft is not None:
        rule = "a stage is added to a run whose first stage has ended"
        raise RunError(rule, run, "finish it by the command that began it")
    return state


def _judge(run: Path, planned: StagePlan, tell: Listener) -> None:
    """Let the rows of earlier stages choose the strength of a stage, if they are to; publish it."""
    if planned.stage.tolerance is None or read_history(run).find(planned.name) is not None:
        return
    trained = state_of_draft(run, planned.name)
    if not needs_judgement(trained):
        return
    strength, gains = guard(trained, planned.stage.tolerance, progress=_reader(tell))
    means = {name: found.mean for name, found in gains.items()}
    tell(StageGuarded(0, planned.name, strength, means))
    work = Work(run, planned.name)
    with work.claimed(planned.stage.config):
        work.publish(strength, [*gains])


def _take_in(run: Path, stage: Stage, tell: Listener) -> None:
    """Combine a stage that has ended beside the others with what the run is combined of."""
    history = read_history(run)
    combined = {
        key for entry in history.entries if entry.kind == "combine" for key in entry.parents
    }
    if stage.name in combined | {entry.key for entry in history.lineage(history.head)}:
        return
    if stage.beside:
        combine_with(run, stage.name, _reader(tell))
        return
    judged = (e.key for e in history.entries if e.kind == "mix" and e.parents == (stage.name,))
    name = next(judged, stage.name)  # at the strength that `accept_links` has chosen
    both = shlex.join([str(run), *history.ends(history.head), stage.name])
    logger.warning(
        "%s stays %s, which is without stage %s; to take it: chainlora undo %s --to %s; to have "
        "both: chainlora combine %s",
        *(run, history.head, stage.name, run, name, both),
    )


def _reader(tell: Listener) -> Progress:
    """Return what is called while kept rows are read, which the same command does again: it tells,
    and raises StoppedError if asked to stop.

    Several processes must stop alike, so they finish what they have begun.
    """

    def read(what: str, done: int, rows: int) -> None:
        number = stop_requested()
        if number is not None and num_launched() == 1:
            got = f"{signal.Signals(number).name} while it was scored, {what}"
            raise StoppedError(f"the run stopped (got {got}); the same command goes on", number)
        tell(KeptRowsRead(0, done, done / rows))

    return read
