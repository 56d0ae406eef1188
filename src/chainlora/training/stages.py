"""`chainlora.train`, `extend`, `rehearse` and `add`: plan, declare, build, score.

What has ended is verified, what is new is declared, then trained and scored. The same call again
declares nothing: it builds what is left, and does nothing where all is done.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from chainlora.config.reading import make_config, read_config
from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage, check_alone, has_stages, make_stages, section_of
from chainlora.errors import RunError
from chainlora.evaluation.forgetting import check_forgetting, need_scored_rows
from chainlora.evaluation.stage_scores import HARM, columns_after_training, stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import Pruning, whole_run
from chainlora.runs.history import MAIN
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import with_start
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in
from chainlora.runs.state import OpenState
from chainlora.showing import Shown
from chainlora.training.addition import addition
from chainlora.training.building import carry_out, reader
from chainlora.training.events import (
    AlreadyFinished,
    EntryBuilt,
    Event,
    ForgettingHeld,
    Listener,
    StageBegins,
)
from chainlora.training.extending import extension
from chainlora.training.loop import Loop, train_stage, tuned
from chainlora.training.placement import Declaring
from chainlora.training.plan import Plan, make_plan, plan_of
from chainlora.training.processes import is_first_launched, wait_for_all
from chainlora.training.progress import progress_listener
from chainlora.training.rehearsing import rehearsal
from chainlora.training.result import TrainResult, result_of

logger = logging.getLogger(__name__)


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
        found = train_run(checked, resume=resume, listener=tell, change=change)
    return cast(TrainResult, Shown(found))


def extend(
    run: str | Path,
    stage: Mapping[str, Any] | str | Path,
    *,
    beside: bool | None = None,
    rehearse: bool = False,
    max_forgetting: float | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train one more stage of a run, and return what its ``result.json`` holds.

    With `beside` it begins on what the run began on, and is then combined with what the run is
    (`combine`), and with `rehearse` rehearsed (`rehearse`). Without, it begins on what `run` names:
    what the run is now, or ``RUN@STAGE``. By default it stands beside the others if their rows are
    answers, and on top of a named state, and with a warning for pairs, on a mix, with `data.replay`
    or `data.new_rows_only`, and where a combination is not possible.

    `stage`, or the YAML file of that path, has a `name`, and the sections data, chain and train;
    the path of a file of rows is enough. What it leaves open is as in the stage before, but for
    rows, ranks, lengths and how the end is chosen: a warning names those keys of the stage before.
    The name is by default that of the file of rows, the length by their number. With `output` it
    becomes a fork that begins on `run`. The same call again goes on where it was stopped.

    With `max_forgetting`, rows that the run kept before are scored before and after. Where a score
    such as accuracy has fallen by more, or the perplexity of a loss risen by more than this share,
    the run becomes what it was before, and ForgettingError is raised; `redo` takes the stage.
    """
    stages = extension(run, stage, beside=beside, rehearse=rehearse)
    return _of_stages(stages, listener, (), progress, max_forgetting)


def rehearse(
    run: str | Path,
    stage: Mapping[str, Any] | None = None,
    *,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a stage on rows that all stages of a run kept, as many of each.

    `stage` may have sections of a stage, by default one link of the largest rank of the run's, at
    0.3 of the last stage's rate, other keys as there. Its steps are the sum over stages of 256
    rows, or twice what a stage kept if that is less, by the batch size; an epoch has up to eight
    rows of each stage, and no batch spans two. So larger batches than 8 rows can read fewer. The
    same call again goes on where it was stopped; where the run ends in a rehearsal, it does
    nothing. Returns what ``result.json`` holds.
    """
    return _of_stages(rehearsal(run, stage or {}), listener, (), progress)


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
    """Add an adapter that was trained elsewhere to a run, and return what the run is then.

    It is combined with what the run is (`combine`), as a stage beside the others is; nothing is
    trained. Where no run is, it begins one, whose base is `model`, by default the one that the
    adapter names.

    Args:
        adapter: the folder or Hub id of a LoRA that PEFT has saved, for the base of the run.
        rows: a file with some of the rows that it was trained on, or a mapping of keys of `data`;
            the run keeps a sample.
        name: of the entry; by default that of the file of rows.
        config: what a new run has one of, such as ``{"train": {"dtype": "bfloat16"}}``.
        max_forgetting: as of `extend`.

    The same call again goes on where it was stopped, or does nothing. Raises ChainLoRAError for a
    run that did not begin on its base, for an adapter of another base, and without rows.
    """
    keys = dict(config or {}) | ({} if model is None else {"model": str(model)})
    own = rows if isinstance(rows, Mapping) else {} if rows is None else {"train": str(rows)}
    keys["data"] = section_of(keys, "data") | dict(own)
    with _shown(listener, progress) as tell:
        plan = addition(run, adapter, name, keys)
        base = base_of(plan.stages[0].stage.config)
        _build(plan, tell, base, max_forgetting)
    return open_run(plan.run)


def _of_stages(
    stages: Sequence[Stage],
    listener: Listener | None,
    change: Collection[str],
    progress: bool | None,
    max_forgetting: float | None = None,
) -> TrainResult:
    """Train what is new, and return the last stage's result."""
    keys: Any = {"change": change, "max_forgetting": max_forgetting}
    with _shown(listener, progress) as tell:
        last = train_stages(stages, listener=tell, **keys)[len(stages) - 1]
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


# --- plans ---


def train_stages(
    stages: Sequence[Stage],
    *,
    listener: Listener | None = None,
    change: Collection[str] = (),
    matrix: bool = True,
    base: OpenBase | None = None,
    max_forgetting: float | None = None,
) -> list[TrainResult | None]:
    """Train what is new of the stages of a run; return a result for each, None of what had ended,
    and those of rehearsals after them.

    `change` names keys that the resume of a stopped stage may change
    (`runs.resuming.CHANGEABLE`). With `matrix`, the rows that stages kept are scored in the states
    where they were not yet (`evaluation.stage_scores`). `max_forgetting` is that of `extend`.

    Raises RunError where a stage that has ended is another one now, and what `train` raises.
    """
    tell, base = listener or (lambda event: None), base or base_of(stages[0].config)
    plan = make_plan(stages, change, base=base)
    results = _build(plan, tell, base, max_forgetting, change, matrix)
    names = [stage.name for stage in stages]
    return [*map(results.get, names), *(r for key, r in results.items() if key not in names)]


def _build(
    plan: Plan,
    tell: Listener,
    base: OpenBase,
    max_forgetting: float | None = None,
    change: Collection[str] = (),
    matrix: bool = True,
) -> dict[str, TrainResult]:
    """Build what a plan names, score it, and undo it where it forgets too much."""
    if max_forgetting is not None:
        need_scored_rows(plan.run, plan.history, max_forgetting)
        if plan.due and plan.target is None:
            rule = "--max-forgetting compares what the run is with what it becomes"
            raise RunError(rule, f"{plan.run}, which does not change", "leave it out")
    results = carry_out(plan, tell, change, base=base)
    if matrix:
        _score(plan.run, tell, base)
    if max_forgetting is not None and is_first_launched():
        names = [each.name for each in plan.stages]
        if held := check_forgetting(plan.run, names, max_forgetting, reader(tell), base):
            tell(ForgettingHeld(0, held))
    return results


def base_of(config: RunConfig) -> OpenBase:
    """Return the base of a config, for all of a command."""
    run = None if config.output is None else Path(config.output).expanduser()
    return OpenBase.of_config(config, run if run is not None and exists_in(run) else None)


def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    change: Collection[str] = (),
    stage: str = MAIN,
    loop: Loop = tuned,
    base: OpenBase | None = None,
) -> TrainResult:
    """Run a config from data to result and return what ``result.json`` holds.

    Like `chainlora.train`, but without showing progress. With `resume`, a run that is in `output`
    goes on, or if it has ended gives its result. `loop` trains it.
    """
    tell, base = listener or (lambda event: None), base or base_of(config)
    plan = make_plan([Stage(stage, config)], change, resume=resume, base=base)
    if config.output is None:
        return train_stage(stage, config, plan.start, tell, base=base, loop=loop)

    def of_the_run(event: Event) -> None:  # it has one stage: nothing is to be told of that
        if not isinstance(event, StageBegins | EntryBuilt):
            tell(event)

    found = carry_out(plan, of_the_run, change, base=base, loop=loop).get(stage)
    _score(plan.run, tell, base)
    if found is None:
        found = result_of(config, stage)
        tell(AlreadyFinished(found["steps"], str(config.output)))
    return found


def combine_again(run: str | Path, pruned: Pruning, *, listener: Listener | None = None) -> None:
    """Combine what a pruning has left of a run, and rehearse it if it was."""
    now = open_run(run)
    left = pruned.left or (now.history.ends(now.key) if pruned.rehearsed else [])
    if len(left) < 2:
        return
    name = now.at(left[-1]).configured.key
    stage = Stage(name, now.at(name).config(), beside=True, rehearse=pruned.rehearsed)
    found = Declaring(now.history, now.run)
    found.combine(left, stage, now.history.recipe_of(now.history.target or now.key))
    base = OpenBase.of_state(now)
    carry_out(plan_of(found), listener or (lambda event: None), base=base)


def build_run(
    run: str | Path, *, listener: Listener | None = None, base: OpenBase | None = None
) -> list[TrainResult]:
    """Build all that was declared in a run and is not built; return the results of its stages.

    Raises RunError for a stage with plug-ins: the command that began it names these.
    """
    folder = whole_run(run)
    found = Declaring(read_history(folder), folder)
    for entry in found.history.unbuilt:
        if plugins := entry.config.get("plugins"):
            rule = "chainlora train RUN runs no plug-ins"
            got = f"{', '.join(plugins)} for {entry.key}"
            raise RunError(rule, got, f"give the command that declared {entry.key} again")
    found.keys = [entry.key for entry in found.history.unbuilt]
    plan = plan_of(found)
    tell = listener or (lambda event: None)
    results = [*carry_out(plan, tell, base=base).values()]
    _score(folder, tell, base)
    return results


def _score(run: Path, tell: Listener, base: OpenBase | None) -> None:
    """Score the rows that stages kept in the states where they were not yet, and warn where general
    ability has fallen."""
    if is_first_launched():
        state = open_run(run)
        if len(state.columns) > 1 and state.keepers:
            matrix = stage_matrix(
                state, progress=reader(tell), of=columns_after_training(state), base=base
            )
            if harm := matrix.harm():
                logger.warning("%s: %s; %s", harm, HARM, _remedy(state))
    wait_for_all()


def _remedy(state: OpenState) -> str:
    """Say what gives back what stages took from the base."""
    place = shlex.quote(str(state.run))
    if any(entry.kind == "combine" for entry in state.lineage):
        return f"chainlora undo {place} takes the last step back"
    return f"chainlora combine {place} combines it with the base"
