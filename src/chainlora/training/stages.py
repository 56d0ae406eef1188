"""Train the stages of a run: `chainlora.train`, `extend`, `add` and `combine`.

Every call takes three steps:
1. change: `make_plan`, `addition` or `edited` make a new version of the run's plan, and refuse bad
   input before anything is written;
2. `reconcile.carry_out` writes the version and computes what it lacks;
3. `score` scores kept rows in the new states.

Repeat a call that was stopped: it makes no new version and computes only what is missing.
Design: docs/decisions/0043-a-plan-and-its-products.md.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from chainlora.config.reading import make_config, read_config
from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage, check_alone, has_stages, make_stages, section_of
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.combination import edited, has_general
from chainlora.evaluation.forgetting import check_forgetting, need_scored_rows
from chainlora.evaluation.stage_scores import HARM, Progress, columns_after_training, stage_matrix
from chainlora.files import replaced_folder
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.beginning import fill_fork, fork_of
from chainlora.runs.changes import whole_run
from chainlora.runs.documents import write_part
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import MAIN
from chainlora.runs.export import empty_folder
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING, with_begun
from chainlora.runs.locks import Scratch, writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import HISTORY, exists_in, split_address
from chainlora.runs.pruning import Pruning, pruning_of, purge, without_stage
from chainlora.runs.state import OpenState
from chainlora.showing import Shown
from chainlora.training.addition import addition
from chainlora.training.events import (
    AlreadyFinished,
    EntryBuilt,
    Event,
    ForgettingHeld,
    LayerSolved,
    Listener,
    StageBegins,
)
from chainlora.training.extending import extension
from chainlora.training.loop import Loop, train_stage, tuned
from chainlora.training.plan import make_plan
from chainlora.training.processes import is_first_launched, wait_for_all
from chainlora.training.progress import progress_listener
from chainlora.training.reconcile import Change, carry_out, reader, settled
from chainlora.training.result import TrainResult, result_of

logger = logging.getLogger(__name__)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a config and return its result, the content of ``result.json``.

    Args:
        config: a config, the path of a YAML file, or a mapping of config keys. With `stages`, the
            call trains the new stages and returns the result of the last one.
        resume: resume a stopped or killed run in `output`, to the same bits. Return the result of
            a finished run, and begin a missing one. Without `resume`, an existing run in `output`
            is refused. Configs with `stages` always resume.
        listener: gets every event (`training.events`): `Planned` before the first step, and
            `RowsEncoded` while a large data set is tokenised before that.
        progress: show progress on stderr: a bar on a terminal, lines in a notebook or a log file.
            By default it is shown unless `listener` is given.

    Returns:
        The result of the run, or of its last stage (`TrainResult`).

    Raises:
        ConfigError: the config cannot be trained, with this model or on this machine.
        DataError: rows that cannot be read.
        ModelError: a model that cannot be loaded, or another base than the run's.
        RunError: `output` holds another run, or one that is damaged.
        TrainingError: training diverged (DivergedError) or was stopped (StoppedError).

    Bad input is refused before training.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    if isinstance(config, RunConfig) and has_stages(dict(config)):
        config = config.model_dump(mode="json")
    if isinstance(config, Mapping) and has_stages(config):
        stages = make_stages(with_begun(config))
        return _train_last(stages, listener, progress)
    checked = check_alone(config if isinstance(config, RunConfig) else make_config(config))
    with with_progress(listener, progress) as shown:
        result = train_run(checked, resume=resume, listener=shown)
    return cast(TrainResult, Shown(result))


def extend(
    run: str | Path,
    stage: Mapping[str, Any] | str | Path,
    *,
    beside: bool | None = None,
    max_forgetting: float | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train one more stage of a run and return its result, the content of ``result.json``.

    Args:
        run: the run, or ``RUN@STAGE`` to begin on another state than its head.
        stage: a mapping, or the path of a YAML file, with `name` and the sections data, chain and
            train. The path of a file of rows is enough: its name becomes the name of the stage,
            and the number of rows gives the length. Other open keys are inherited from the stage
            before, data.fields and data.format if the rows have these columns. Rows, ranks,
            lengths and the choice of the best point are not inherited; a warning names them. With
            `output`, the stage becomes a fork that begins on `run`.
        beside: train the stage on the run's origin, then combine it with the head (`combine`).
            False: train it on the state that `run` names. By default answers are trained beside
            the others; pairs, and every stage if `run` names a state, on top.
        max_forgetting: score the rows that the run kept, before and after. If a score such as
            accuracy falls by more than this, or the perplexity of a loss rises by more than this
            share, undo the stage and raise ForgettingError. `redo` keeps the stage after all.
        listener: see `train`.
        progress: see `train`.

    Returns:
        The result of the stage (`TrainResult`).

    Raises:
        ConfigError: a stage without a name, or keys that a stage cannot have.
        RunError: the stage was begun on another state, or the run's first stage has not ended.
        ForgettingError: see `max_forgetting`.
        ChainLoRAError: for everything that `train` refuses.

    Repeat a call that was stopped to resume it.
    """
    stages = extension(run, stage, beside=beside)
    return _train_last(stages, listener, progress, max_forgetting)


def add(
    run: str | Path,
    adapter: str | Path,
    rows: str | Path | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    model: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    max_forgetting: float | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> OpenState:
    """Add an adapter that was trained elsewhere to a run, and return the run's new state.

    The adapter is combined with the head (`combine`), like a stage beside the others. Nothing is
    trained.

    Args:
        run: the run; a missing one is created.
        adapter: the folder or Hub id of a LoRA saved by PEFT, for the base of the run.
        rows: a file with some of the adapter's training rows, or a mapping of keys of `data`. The
            run keeps a sample.
        name: name of the new entry; by default the name of the file of rows.
        model: base of a new run; by default the base that the adapter names.
        config: keys of a new run: those that all its stages share, as in
            ``{"train": {"dtype": "bfloat16"}}``, and `start_data`.
        max_forgetting: see `extend`.
        listener: see `train`.
        progress: see `train`.

    Returns:
        The state at the run's head.

    Raises:
        ConfigError: unknown keys, or no rows.
        RunError: no adapter, a name that is taken, or a run that did not begin on its base.
        ModelError: an adapter of another base.
        ForgettingError: see `extend`.

    Repeat a call that was stopped to resume it. A finished call does nothing.
    """
    keys = dict(config or {}) | ({} if model is None else {"model": str(model)})
    data = rows if isinstance(rows, Mapping) else {} if rows is None else {"train": str(rows)}
    own = section_of(keys, "data")
    if both := own.keys() & data.keys():
        rule, got = "an adapter's rows are given once", f"data.{min(both)} and rows"
        raise ConfigError(rule, got, "leave one out")
    keys["data"] = own | dict(data)
    with with_progress(listener, progress) as shown, writing(split_address(run)[0]):
        plan = addition(run, adapter, name, keys)
        base = base_of(plan.stages[0].stage.config)
        build_and_score(plan, shown, base, max_forgetting)
    return open_run(plan.run)


def _train_last(
    stages: Sequence[Stage],
    listener: Listener | None,
    progress: bool | None,
    max_forgetting: float | None = None,
) -> TrainResult:
    """Train the new stages and return the result of the last one."""
    with with_progress(listener, progress) as shown:
        results = train_stages(stages, listener=shown, max_forgetting=max_forgetting)
    last = results[len(stages) - 1]
    result = last or result_of(stages[-1].config, stages[-1].name)
    return cast(TrainResult, Shown(result))


@contextmanager
def with_progress(listener: Listener | None, progress: bool | None) -> Iterator[Listener]:
    """Yield a listener that also shows progress, in the first process, unless it is off."""
    is_shown = (listener is None) if progress is None else progress
    is_shown &= is_first_launched()
    with progress_listener() if is_shown else nullcontext(_ignore) as show:

        def show_and_forward(event: Event) -> None:
            show(event)
            if listener is not None:
                listener(event)

        yield show_and_forward


def _ignore(event: Event) -> None:
    """Be the listener of a call without one."""


# --- plans ---


def train_stages(
    stages: Sequence[Stage],
    *,
    listener: Listener | None = None,
    matrix: bool = True,
    base: OpenBase | None = None,
    max_forgetting: float | None = None,
) -> list[TrainResult | None]:
    """Train the new stages of a config, or the one of `extend`.

    Returns the result of each stage, None for those finished before.
    `matrix` scores kept rows in all states without a score (`evaluation.stage_scores`).
    """
    listener, base = listener or _ignore, base or base_of(stages[0].config)
    with _held(stages[0].config):
        plan = make_plan(stages, base=base)
        results = build_and_score(plan, listener, base, max_forgetting, matrix)
    names = [stage.name for stage in stages]
    return [*map(results.get, names), *(r for key, r in results.items() if key not in names)]


def build_and_score(
    change: Change,
    listener: Listener,
    base: OpenBase | None,
    max_forgetting: float | None = None,
    matrix: bool = True,
    loop: Loop = tuned,
) -> dict[str, TrainResult]:
    """Carry a change out, score its entries, and undo it if it forgets too much."""
    run = change.run
    if max_forgetting is not None:
        before = read_history(run) if exists_in(run) else change.history
        need_scored_rows(run, before, max_forgetting)
    results = carry_out(change, listener, base=base, loop=loop)
    if matrix:
        score(run, listener, base)
    if max_forgetting is not None and is_first_launched():
        names = [planned.name for planned in change.stages]
        if held := check_forgetting(run, names, max_forgetting, reader(listener), base):
            listener(ForgettingHeld(0, held))
    return results


@contextmanager
def _held(config: RunConfig) -> Iterator[None]:
    """Hold the run of a config in the first process, if it exists; a new one is held later."""
    has_run = config.output is not None and is_first_launched()
    with writing(Path(config.output or "").expanduser()) if has_run else nullcontext():
        yield


def base_of(config: RunConfig) -> OpenBase:
    """Return the base of a config; one command opens it once."""
    run = None if config.output is None else Path(config.output).expanduser()
    return OpenBase.of_config(config, run if run is not None and exists_in(run) else None)


def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    stage: str = MAIN,
    loop: Loop = tuned,
    base: OpenBase | None = None,
) -> TrainResult:
    """Train a config of one stage like `chainlora.train`, without progress; return its result."""
    listener, base = listener or _ignore, base or base_of(config)

    def without_stages(event: Event) -> None:  # the run has a single stage
        if not isinstance(event, StageBegins | EntryBuilt):
            listener(event)

    with _held(config):
        plan = make_plan([Stage(stage, config)], resume=resume, base=base)
        if config.output is None:
            return train_stage(stage, config, NOTHING, listener, base=base, loop=loop)
        result = build_and_score(plan, without_stages, base, loop=loop).get(stage)
    if result is None:
        result = result_of(config, stage)
        listener(AlreadyFinished(result["steps"], str(config.output)))
    return result


def combine(
    run: str | Path,
    names: str | Path | Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    listener: Listener | None = None,
    base: OpenBase | None = None,
    **how: Any,
) -> OpenState:
    """Combine states of a run, and other runs. The run becomes the combination.

    Args:
        run: the run.
        names: stages of the run, each with its ancestors, and other runs on the same base, whose
            stages are copied into this run. By default the parts of the run are combined; if it is
            not a combination, all stages that no other stage was trained on.
        output: a new folder: the combination becomes a new run, and this one does not change.
        progress: called as ``progress(parts, layers_done, layers)``.
        listener: see `train`.
        base: the base, if it is open already.
        rank: rank of the combination, which is one link; by default the sum of the ranks of all
            links of the parts, at least 16.
        importance: a weight for the rows of a part, by its name, or for all parts from another run,
            by the name given to that run; by default 1.
        general: combine the base too, by the rows that were kept for it; by default true.
        keep_conflicts: use rows even if their prompt has another answer in a later stage.
        steps: train the combined link for this many steps on kept rows; a killed call resumes.

    Returns:
        The new state.

    Raises:
        RunError: fewer than two parts, a part that another one was trained on, stages without kept
            rows, links that are not low-rank sums, a model that cannot be solved layer by layer, or
            runs with another base, precision, tokenizer or chat template.
    """
    folder, listener = whole_run(run), listener or _ignore
    if progress is not None:
        listener = _telling(progress)
    if output is None:
        with writing(folder):
            history = settled(folder, read_history(folder))
            need_idle(folder, history, "combine")
            carry_out(Change(folder, edited(folder, history, names, **how)), listener, base=base)
        return open_run(folder)
    target = empty_folder(output)
    first, *others = _addresses(folder, names)
    with replaced_folder(target, only_empty=True) as scratch:
        state = open_run(first)
        history = fill_fork(scratch, state, fork_of(state))
        write_part(scratch / HISTORY, history)
        change = Change(scratch, edited(scratch, history, [state.key, *others], **how))
        carry_out(change, listener, base=base)
    return open_run(target)


def _addresses(run: Path, names: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the addresses of parts: those of a run by its name, others as they are."""
    history = read_history(run)
    given = [str(name) for name in ([names] if isinstance(names, str | Path) else names)]
    own = [name for name in given if history.find(name) is not None]
    own = own or history.parts(history.head)
    return [*(f"{run}@{key}" for key in own), *(name for name in given if name not in own)]


def _telling(progress: Progress) -> Listener:
    """Return a listener that calls `progress` with the layers of a combination."""

    def listener(event: Event) -> None:
        if isinstance(event, LayerSolved):
            progress(event.parts, event.layer, event.layers)

    return listener


def need_idle(run: Path, history: History, verb: str) -> None:
    """Raise RunError while a stage is in training."""
    if drafts := drafts_in(run, history):
        name, place = next(iter(drafts)), shlex.quote(str(run))
        rule = f"Cannot {verb}: stage {name} is unfinished"
        remedy = f"chainlora train {place} finishes it, chainlora undo {place} drops it"
        raise RunError(rule, drafts[name], remedy)


def prune(run: str | Path, name: str, *, listener: Listener | None = None) -> Pruning:
    """Delete a stage for good: links, rows, config, records, result, scores. Return what went.

    What is left is checked and combined first. So an error or a kill leaves the run as it was, or
    without the stage; the same call again deletes the rest.

    Raises what `plan_pruning` raises, RunError if what is left is damaged, and FileError for a file
    that cannot be deleted.
    """
    folder = whole_run(run)
    with writing(folder):
        history = settled(folder, read_history(folder))
        pruning = pruning_of(folder, history, name)
        after = without_stage(folder, history, name)
        for key in pruning.left:
            if after.find(key) is not None:
                state_at(folder, after, key).verify()
        drafts = drafts_in(folder, history)
        carry_out(Change(folder, after, pruned=name), listener or _ignore)
        if name in drafts:
            Scratch(folder, drafts[name]).undo()
        if not after.versions[after.at].marks:  # else it has been done
            purge(folder, name)
    return pruning


def build_run(
    run: str | Path, *, listener: Listener | None = None, base: OpenBase | None = None
) -> list[TrainResult]:
    """Compute what a run lacks; return the results of its stages."""
    folder = whole_run(run)
    with writing(folder) if is_first_launched() else nullcontext():
        history = read_history(folder)
        for stage in history.plan().stages:
            if stage.plugins and history.find(stage.name) is None:
                rule = "chainlora train RUN runs no plug-ins"
                got = f"{', '.join(stage.plugins)} for {stage.name}"
                raise RunError(rule, got, f"repeat the command that began {stage.name}")
        change = Change(folder, history)
        return [*build_and_score(change, listener or _ignore, base).values()]


def score(run: Path, listener: Listener, base: OpenBase | None) -> None:
    """Score kept rows in states without a score; tell if general ability fell, or came back."""
    if is_first_launched():
        state, place = open_run(run), shlex.quote(str(run))
        if len(state.columns) > 1 and state.keepers:
            of = columns_after_training(state)
            matrix = stage_matrix(state, progress=reader(listener), of=of, base=base)
            if harm := matrix.harm():
                remedy = f"chainlora combine {place} combines it with the base, as extend does"
                if not has_general(state) or any(e.kind == "combine" for e in state.lineage):
                    remedy = f"chainlora undo {place} takes the last step back"
                logger.warning("%s: %s; %s", harm, HARM, remedy)
            elif told := matrix.restored():
                listener(ForgettingHeld(0, told))
    wait_for_all()
