"""`chainlora.train`, `chainlora.extend`, and the stages of a run, which they train.

What has ended is verified, what is new is trained and scored. Each stage is trained by the
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
from pathlib import Path
from typing import Any, cast

from chainlora.chain.showing import Shown
from chainlora.config.reading import make_config, read_config
from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage, check_alone, has_stages, make_stages
from chainlora.errors import StoppedError
from chainlora.evaluation.combination import combine_with
from chainlora.evaluation.stage_scores import Progress, stage_matrix
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.history import History, read_history
from chainlora.runs.loading_start import start_at, with_start
from chainlora.runs.start import Start
from chainlora.runs.work import Work
from chainlora.training.events import Event, KeptRowsRead, Listener, StageBegins
from chainlora.training.extending import extension, rehearsal
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import train as run_training
from chainlora.training.loop import train_stage
from chainlora.training.placement import (
    StagePlan,
    begins_on,
    is_combination_due,
    is_rehearsal_due,
    need_below,
)
from chainlora.training.plan import make_plan
from chainlora.training.processes import is_first_launched, num_launched, wait_for_all
from chainlora.training.progress import progress_listener
from chainlora.training.refusing import naming
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
        found = run_training(checked, resume=resume, listener=tell, change=change)
    return cast(TrainResult, Shown(found))


def extend(
    run: str | Path,
    stage: Mapping[str, Any] | str | Path,
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
    answers, and on top of a named state, and with a warning for pairs, on a mix, with `data.replay`
    or `data.new_rows_only`, and where a combination is not possible.

    `stage`, or the YAML file of that path, has a `name`, and the sections data, chain and train;
    the path of a file of rows is enough. What it leaves open is as in the stage before, but for
    rows, ranks, lengths and how the end is chosen: a warning names those keys of the stage before.
    The name is by default that of the file of rows, the length by their number. With `output` it
    becomes a fork that begins on `run`. The same call again goes on where it was stopped.
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
    """Train a stage on rows that all stages of a run kept, as many of each.

    `stage` may have sections of a stage, by default one link of the largest rank of the run's, at
    0.3 of the last stage's rate, other keys as there. Its steps are the sum over stages of 256
    rows, or twice what a stage kept if that is less, by the batch size; an epoch has up to eight
    rows of each stage, and no batch spans two. So larger batches than 8 rows can read fewer. The
    same call again goes on where it was stopped; where the run ends in a rehearsal, it does
    nothing. Returns what ``result.json`` holds.
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
    and those of rehearsals after them.

    `change` names keys that the resume of a stopped stage may change
    (`runs.resuming.CHANGEABLE`). With `matrix`, the rows that stages kept are scored in the states
    where they were not yet (`evaluation.stage_scores`).

    Raises RunError where a stage that has ended is another one now, and what `train` raises.
    """
    tell = listener or (lambda event: None)
    plan = make_plan(stages, change)
    run, results = Path(stages[0].config.output or ""), list[TrainResult | None]()
    rehearsed = list[TrainResult | None]()
    for place, planned in enumerate(plan.stages):
        tell(StageBegins(planned.step, planned.name, planned.state, bool(planned.stage.beside)))
        if planned.state == "finished":
            Work(run, planned.name, writes=is_first_launched()).tidy()
            results.append(None)
        else:
            start = _start_of(run, planned, plan.stages[:place]) if place else plan.start
            with naming(planned.stage):
                results.append(train_stage(planned, start, tell, change=change))
            wait_for_all()
        if is_first_launched():
            _take_in(run, planned, tell)
        wait_for_all()
        if is_rehearsal_due(read_history(run), planned.stage):
            named = {"plugins": [*planned.stage.config.plugins]}
            rehearsed += train_stages(rehearsal(run, named), listener=listener, matrix=False)
    if matrix and is_first_launched():
        state = open_run(run)
        if len(state.columns) > 1 and state.keepers:
            stage_matrix(run, progress=_reader(tell))
    wait_for_all()
    return results + rehearsed


def _start_of(run: Path, planned: StagePlan, before: Sequence[StagePlan]) -> Start:
    """Return what a stage after the first begins on now, or a stopped one has begun on."""
    now = state_at(run, read_history(run))
    if planned.state == "new":
        need_below(now, [each.stage for each in before])
    return start_at(begins_on(now, planned))


def _take_in(run: Path, planned: StagePlan, tell: Listener) -> None:
    """Combine a stage beside others with what the run is. Warn of one that ended apart from it."""
    name, history = planned.name, read_history(run)
    if is_combination_due(history, planned.stage):  # also where a kill came before it
        combine_with(run, name, _reader(tell))
        return
    if name in {entry.key for entry in history.lineage(history.head)}:
        return
    end = _entry_with(name, history)
    below = {entry.key for entry in history.lineage(end)}  # which it brings along
    others = [key for key in history.ends(history.head) if key not in below]
    both = shlex.join([str(run), *others, name])
    logger.warning(
        "%s stays %s, which is without stage %s; to take it: chainlora undo %s --to %s%s",
        *(run, history.head, name, shlex.quote(str(run)), end),
        f"; to have both: chainlora combine {both}" if others else "",
    )


def _entry_with(name: str, history: History) -> str:
    """Return an entry that has a stage and all that the run is now, rehearsed if it was; else the
    stage itself."""
    wanted = {*history.ends(history.head), name}
    found = [
        each.key
        for each in history.entries
        if each.kind != "mix" and wanted <= {e.key for e in history.lineage(each.key)}
    ]
    found = [key for key in found if history.ends(key) == history.ends(found[0])]
    return found[-1] if found else name


def _reader(tell: Listener) -> Progress:
    """Return what is called while kept rows are read, which the same command does again: it tells,
    and raises StoppedError if asked to stop.

    Several processes must stop alike, so they finish what they have begun.
    """

    def read(what: str, done: int, rows: int) -> None:
        number = stop_requested()
        if number is not None and num_launched() == 1:
            got = f"{signal.Signals(number).name} while kept rows were read, {what}"
            raise StoppedError(f"the run stopped (got {got}); the same command goes on", number)
        tell(KeptRowsRead(0, done, done / rows))

    return read
