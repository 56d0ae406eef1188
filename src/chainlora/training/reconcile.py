"""Compute what the plan of a run lacks: `reconcile` is the only builder.

    carry_out    write the new version of a change; reconcile; if it is refused, take it back
    reconcile    for each recipe without an entry, parents first: train, import or combine; then
                 delete what the version marks

The base is opened once. Each entry is written as soon as it is computed, so a kill loses only the
work at hand; a stage resumes from its checkpoint.
"""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from chainlora import files
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError, FileError, RunError, StoppedError
from chainlora.evaluation.combination import build_combination, summary_of
from chainlora.evaluation.stage_scores import Progress
from chainlora.evaluation.start_rows import build_start
from chainlora.runs.adding import build_import
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import config_of, write_plan
from chainlora.runs.draft import drafts_in, ended_leftovers
from chainlora.runs.entries import BASE, Due, Entry
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.keys import Made
from chainlora.runs.loading_start import NOTHING, Start, start_at
from chainlora.runs.locks import Scratch, writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in
from chainlora.runs.pruning import purge
from chainlora.runs.resuming import not_named
from chainlora.training.events import EntryBuilt, KeptRowsRead, LayerSolved, Listener, StageBegins
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import Loop, train_stage, tuned
from chainlora.training.processes import is_first_launched, num_launched, wait_for_all
from chainlora.training.refusing import StagePlan, naming
from chainlora.training.result import TrainResult

logger = logging.getLogger(__name__)


Execute = Mapping[str, Callable[[Path, Due], TrainResult | None]]
"""By kind of recipe: computes one, or resumes it, and writes its entry; stages have a result."""


@dataclass(frozen=True)
class Change:
    """A new version of a run, and the stages of the command that makes it."""

    run: Path
    history: History  # with the new version
    stages: tuple[StagePlan, ...] = ()
    configs: Mapping[str, RunConfig] = field(default_factory=dict)  # of these stages, by name
    start: Start = NOTHING  # of a new run
    pruned: str = ""  # the stage to delete

    @property
    def due(self) -> list[StagePlan]:
        """Return the stages that are not finished."""
        return [planned for planned in self.stages if planned.state != "finished"]

    def is_combined_after(self, name: str) -> bool:
        """Say whether a combination follows a stage."""
        root = self.history.recipes().root
        is_last = bool(self.stages) and self.stages[-1].name == name
        return is_last and root.kind == "combine" and not Made(self.history).is_made(root)


def carry_out(
    change: Change,
    listener: Listener,
    *,
    base: OpenBase | None = None,
    loop: Loop = tuned,
    after: Callable[[Entry], object] = lambda entry: None,
    execute: Execute | None = None,
) -> dict[str, TrainResult]:
    """Write the version of a change, and compute what it lacks; return the results of its stages.

    `after` is called with each new entry. If the work is refused before anything is computed, the
    version is taken back.
    """
    run, is_new_run = change.run, not exists_in(change.run)
    before = None if is_new_run else read_history(run)
    is_edit = before is None or before.versions != change.history.versions
    wait_for_all()  # every process has made its plan
    if is_first_launched():
        if before is not None:
            _tell_dropped(run, before, change.history)
        write_plan(run, with_base(change, base), change.start)
    wait_for_all()
    with writing(run) if is_first_launched() else nullcontext():
        try:
            work = execute or _executing(change, listener, base, loop)
            return reconcile(change, listener, after, work)
        except BaseException:
            if is_first_launched() and is_edit:
                with suppress(ChainLoRAError):  # the first error matters
                    _take_back(run, is_new_run=is_new_run)
            raise


def _tell_dropped(run: Path, before: History, after: History) -> None:
    """Warn of stages that a killed command left without a beginning, and that are dropped."""
    names = [name for name in before.plan().names if before.find(name) is None]
    if dropped := [name for name in names if after.plan().find(name) is None]:
        told = "%s of %s had not begun and is dropped; repeat its command to train it"
        logger.warning(told, ", ".join(dropped), run)


def with_base(change: Change, base: OpenBase | None) -> History:
    """Return the history of a change; that of a new run gets facts of the base."""
    history = change.history
    if history.base.files is not None or base is None or not change.configs:
        return history
    # they are unknown when a new run is planned, because the base is opened later
    first = next(iter(change.configs.values()))
    facts = {"files": base.files, "dtype": first.train.dtype, "quantize": first.quantize}
    return history.model_copy(update={"base": history.base.model_copy(update=facts)})


def _take_back(run: Path, *, is_new_run: bool) -> None:
    """Drop the last versions, of which nothing was computed; delete a new run without a stage."""
    history = settled(run, read_history(run))
    if is_new_run and not history.versions[history.at].command:  # perhaps a copy of another run
        files.remove(run)
    else:
        update_history(run, lambda now: history)


def settled(run: Path, history: History) -> History:
    """Return a history without the last versions of which nothing was computed.

    A killed command left them. The same command makes them again.
    """
    while history.at == len(history.versions) - 1 and history.at > 0:
        made, recipes = Made(history), history.recipes()
        version = history.versions[history.at]
        if version.command == "" or made.is_made(recipes.root):  # a fork begins with a copy
            return history
        earlier = {stage.identity for stage in history.plan(version.before).stages}
        new = [stage for stage in history.plan().stages if stage.identity not in earlier]
        names = {stage.name for stage in new}
        if any(history.find(name) for name in names) or names & drafts_in(run, history).keys():
            return history
        history = history.dropped()
    return history


def reconcile(
    change: Change, listener: Listener, after: Callable[[Entry], object], execute: Execute
) -> dict[str, TrainResult]:
    """Compute what the current version of a run lacks; see `carry_out`."""
    run, results = change.run, dict[str, TrainResult]()
    for planned in (planned for planned in change.stages if planned.state == "finished"):
        is_beside = bool(planned.stage.beside)
        listener(StageBegins(planned.step, planned.name, planned.state, is_beside))
    if is_first_launched():
        with suppress(FileError):  # the disk is read-only
            for folder in {path.parent for path in ended_leftovers(run, read_history(run))}:
                Scratch(run, folder).remove_passing()
    while (due := next_due(read_history(run))) is not None:
        began = time.monotonic()
        if due.kind == "stage" or is_first_launched():
            result = execute[due.kind](run, due)
            results |= {} if result is None else {due.key: result}
        wait_for_all()
        history, seconds = read_history(run), time.monotonic() - began
        built = next(entry for entry in history.entries if entry.digest == due.digest)
        listener(EntryBuilt(0, built.key, built.kind, seconds, summary_of(history, built.key)))
        after(built)
    if is_first_launched() and read_history(run).versions[read_history(run).at].marks:
        purge(run, change.pruned)
    elif is_first_launched():
        _warn_of_missing(change)
    return results


def _warn_of_missing(change: Change) -> None:
    """Warn of stages of a command that the run is not made of."""
    run, history = change.run, read_history(change.run)
    for name in (each.name for each in change.stages if each.name not in history.plan().active):
        entry = _entry_with(name, history)
        others = [k for k in history.parts(history.head) if k not in history.below(entry)]
        both = shlex.join([str(run), *others, name])
        logger.warning(
            "%s stays %s, which does not include stage %s; to take the stage: chainlora undo %s "
            "--to %s%s",
            *(run, history.head, name, shlex.quote(str(run)), entry),
            f"; to have both: chainlora combine {both}" if others else "",
        )


def _entry_with(name: str, history: History) -> str:
    """Return the first entry with a stage and all parts of the head; else the stage."""
    wanted = {*history.parts(history.head), name}
    known = [entry.key for entry in history.entries]
    return next((key for key in known if wanted <= history.below(key)), name)


def _executing(change: Change, listener: Listener, base: OpenBase | None, loop: Loop) -> Execute:
    """Return what computes each kind of recipe."""
    return {
        "start": lambda run, due: build_start(
            run, due, base, reader(listener, "writing general rows")
        ),
        "stage": lambda run, due: _train(change, due, listener, base, loop),
        "import": lambda run, due: build_import(run, due, base),
        "combine": lambda run, due: build_combination(run, due, solver(listener), base),
    }


def next_due(history: History) -> Due | None:
    """Return what is to be computed next, None if the current version is complete."""
    made = Made(history)
    recipe = made.due(history.recipes().wanted)
    return None if recipe is None else history.due(recipe, made)


def _train(
    change: Change, due: Due, listener: Listener, base: OpenBase | None, loop: Loop
) -> TrainResult:
    """Train a stage of the plan, or resume it."""
    run, name = change.run, due.key
    history, begun = read_history(run), begun_stage(run, name)
    step = 0 if begun is None or begun.draft is None else begun.draft.position.step
    is_beside = not due.stage.names and len(history.plan().active) > 1
    listener(StageBegins(step, name, "new" if begun is None else "stopped", is_beside))
    start = start_at(state_at(run, history, due.parents[0] if due.parents else BASE))
    config = change.configs.get(name)
    if config is None:
        config = config_of(run, due.stage)
        train = config.train.model_copy(update=_NO_TRACKERS)
        # the run may have been moved or copied, or come from somebody else
        config = config.model_copy(update={"train": train, "output": str(run)})
        if config.plugins:
            raise RunError(not_named(f"train {name} of {run}", config.plugins))
    own = next((planned.stage for planned in change.stages if planned.name == name), None)
    with naming(own if len(change.stages) > 1 else None):
        return train_stage(name, config, start, listener, base=base, loop=loop)


_NO_TRACKERS = {"trackers": ()}  # the run may come from somebody else: trackers must be named again


# --- progress ---


def reader(listener: Listener, doing: str = "scoring kept rows") -> Progress:
    """Return a callback for scoring or writing kept rows: it sends events and stops on a signal."""

    def read(what: str, done: int, rows: int) -> None:
        _stop_if_requested(f"{doing}, {what}")
        listener(KeptRowsRead(0, done, done / rows, doing, what))

    return read


def solver(listener: Listener) -> Progress:
    """Return a callback for solving a combination: it sends events and stops on a signal."""

    def solved(parts: str, layer: int, layers: int) -> None:
        _stop_if_requested(f"combining {parts}")
        listener(LayerSolved(0, parts, layer, layers))

    return solved


def _stop_if_requested(doing: str) -> None:
    """Raise StoppedError if a signal asked to stop; the same command repeats the work."""
    number = stop_requested()
    # several processes must stop at the same point, so they finish the work at hand
    if number is not None and num_launched() == 1:
        got = f"{signal.Signals(number).name} while {doing}"
        raise StoppedError(f"the run stopped (got {got}); repeat the command to resume", number)
