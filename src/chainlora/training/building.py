"""Build declared entries: compute a state for each, parents first.

The base is opened once. Stopped stages resume. Design:
docs/decisions/0034-entries-are-declared-then-built.md, "Build".
"""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from chainlora.errors import ChainLoRAError, RunError, StoppedError, TrainingError
from chainlora.evaluation.combination import build_combination, summary_of
from chainlora.evaluation.stage_scores import Progress
from chainlora.evaluation.start_rows import build_start
from chainlora.runs.adding import build_import
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.declaring import declare, declared_config, withdraw
from chainlora.runs.draft import DRAFT, ended_leftovers
from chainlora.runs.history import START, Entry, History, Unbuilt
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import start_at
from chainlora.runs.locks import writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.paths import exists_in, stage_folder
from chainlora.runs.resuming import not_named
from chainlora.runs.work import Work
from chainlora.training.events import EntryBuilt, KeptRowsRead, LayerSolved, Listener, StageBegins
from chainlora.training.interrupts import stop_requested
from chainlora.training.loop import Loop, train_stage, tuned
from chainlora.training.plan import Plan
from chainlora.training.processes import is_first_launched, num_launched, wait_for_all
from chainlora.training.refusing import naming
from chainlora.training.result import TrainResult

logger = logging.getLogger(__name__)


def carry_out(
    plan: Plan,
    listener: Listener,
    *,
    base: OpenBase | None = None,
    loop: Loop = tuned,
    after: Callable[[Entry], object] = lambda entry: None,
) -> dict[str, TrainResult]:
    """Declare and build the entries of a plan; return the results of stages trained here.

    `after` is called with each built entry. If a stage fails before it has written
    ``stage.json``, the declarations of the command are withdrawn.
    """
    # 1. The first process declares the entries; the others wait.
    run, is_new_run = plan.run, not exists_in(plan.run)
    wait_for_all()  # every process has made its plan
    if is_first_launched():
        declare(run, _with_base(plan, base), plan.new, plan.target, plan.start)
    wait_for_all()
    with writing(run) if is_first_launched() else nullcontext():
        return _build(plan, listener, base, loop, after, is_new_run=is_new_run)


def _build(
    plan: Plan,
    listener: Listener,
    base: OpenBase | None,
    loop: Loop,
    after: Callable[[Entry], object],
    *,
    is_new_run: bool,
) -> dict[str, TrainResult]:
    """Build the declared entries of a plan."""
    # 2. Report finished stages, and clean up after them.
    run, results = plan.run, dict[str, TrainResult]()
    before = read_history(run)
    for planned in (planned for planned in plan.stages if planned.state == "finished"):
        is_beside = bool(planned.stage.beside)
        listener(StageBegins(planned.step, planned.name, planned.state, is_beside))
    for name in {path.parent.name for path in ended_leftovers(run, before)}:
        Work(run, name, writes=is_first_launched()).tidy()
    # 3. Build entries until none is due.
    while (entry := _next_due(plan)) is not None:
        began = time.monotonic()
        with _withdrawing(plan, entry, is_new_run):
            if entry.kind == "stage":
                results[entry.key] = _train(plan, entry, listener, base, loop)
            elif is_first_launched():
                _compute(run, entry, listener, base)
        wait_for_all()
        seconds, history = time.monotonic() - began, read_history(run)
        summary = summary_of(history, entry.key)
        listener(EntryBuilt(0, entry.key, entry.kind, seconds, summary))
        built = history.find(entry.key)
        assert built is not None
        after(built)
    if is_first_launched():
        _warn_of_missing_stages(plan)
    return results


def _with_base(plan: Plan, base: OpenBase | None) -> History:
    """Return the planned history; in a new run with files, dtype and quantisation of the base."""
    if plan.history.base.files is not None or base is None or not plan.stages:
        return plan.history
    # they are unknown when a new run is planned, because the base is opened later
    first = plan.stages[0].stage.config
    facts = {"files": base.files, "dtype": first.train.dtype, "quantize": first.quantize}
    base_facts = plan.history.base.model_copy(update=facts)
    return plan.history.model_copy(update={"base": base_facts})


@contextmanager
def _withdrawing(plan: Plan, entry: Unbuilt, is_new_run: bool) -> Iterator[None]:
    """Withdraw the declarations of a plan if one of its stages fails before it has begun.

    A stage that is stopped stays declared; a start does not, since the next command may begin on
    another one.
    """
    try:
        yield
    except BaseException as error:
        folder = stage_folder(plan.run, entry.key)
        names = [START] * bool(plan.new) + [planned.name for planned in plan.stages]
        has_begun = (folder / DRAFT).exists()
        is_stopped = isinstance(error, TrainingError | KeyboardInterrupt) and entry.key != START
        if is_first_launched() and entry.key in names and not (has_begun or is_stopped):
            # otherwise the refused stage would be in the way of the next command
            keys = [START] * is_new_run + [entry.key, *(declared.key for declared in plan.new)]
            with suppress(ChainLoRAError):  # the first error matters
                withdraw(plan.run, keys, is_new_run=is_new_run)
        raise


def _next_due(plan: Plan) -> Unbuilt | None:
    """Return the first unbuilt entry that this command builds, or None.

    All its parents are built. Entries of the command come first, then their ancestors, then
    combinations on the way to the target. An entry of another command with plug-ins is left.
    """
    history, planned = read_history(plan.run), {START, *plan.keys}
    wanted = planned | {name for key in plan.keys for name in history.below(key)}
    ahead = set() if history.target is None else history.below(history.target)
    for entry in sorted(history.unbuilt, key=lambda entry: entry.key not in planned):
        if not (entry.key in wanted or (entry.key in ahead and entry.kind == "combine")):
            continue
        if any(history.find(key) is None for key in entry.parents):
            continue
        if entry.key in planned or not entry.config.get("plugins"):
            return entry
    return None


def _train(
    plan: Plan, entry: Unbuilt, listener: Listener, base: OpenBase | None, loop: Loop
) -> TrainResult:
    """Train a declared stage, or resume it."""
    run, name = plan.run, entry.key
    begun = begun_stage(run, name)
    step = 0 if begun is None or begun.draft is None else begun.draft.position.step
    stage = next((planned.stage for planned in plan.stages if planned.name == name), None)
    is_beside = stage is not None and bool(stage.beside)
    listener(StageBegins(step, name, "new" if begun is None else "stopped", is_beside))
    start = start_at(state_at(run, read_history(run), entry.parent))
    config = plan.configs.get(name)
    if config is None:
        config = declared_config(run, entry) if begun is None else begun.config()
        train = config.train.model_copy(update=_NO_TRACKERS)
        # the run may have been moved or copied, or come from somebody else
        config = config.model_copy(update={"train": train, "output": str(run)})
        if config.plugins:
            raise RunError(not_named(f"train {name} of {run}", config.plugins))
    with naming(stage if len(plan.stages) > 1 else None):
        return train_stage(name, config, start, listener, base=base, loop=loop)


_NO_TRACKERS = {"trackers": ()}  # the run may come from somebody else: trackers must be named again


def _compute(run: Path, entry: Unbuilt, listener: Listener, base: OpenBase | None) -> None:
    """Compute the state of a combination or an import: nothing is trained."""
    if entry.kind == "combine":
        build_combination(run, entry.key, solver(listener), base)
    elif entry.key == START:
        build_start(run, entry, base, reader(listener, "writing general rows"))
    else:
        build_import(run, entry, base)


def _warn_of_missing_stages(plan: Plan) -> None:
    """Warn of stages that the head does not include, and of entries that are not built."""
    run, history = plan.run, read_history(plan.run)
    if waiting := [key for key in plan.keys if history.find_unbuilt(key) is not None]:
        missing = {name for key in waiting for name in history.below(key)} - {*waiting}
        names = [entry.key for entry in history.unbuilt if entry.key in missing]
        logger.warning("%s of %s waits for %s", ", ".join(waiting), run, ", ".join(names))
        return
    included = history.below(history.head)
    names = [planned.name for planned in plan.stages] or history.without_ancestors(plan.keys)
    for name in (name for name in names if name not in included):
        entry = _entry_with(name, history)
        others = [k for k in history.parts(history.head) if k not in history.below(entry)]
        both = shlex.join([str(run), *others, name])
        built = history.find(name)
        kind = "combination" if built is not None and built.kind == "combine" else "stage"
        logger.warning(
            "%s stays %s, which does not include %s %s; to take the %s: "
            "chainlora undo %s --to %s%s",
            *(run, history.head, kind, name, kind, shlex.quote(str(run)), entry),
            f"; to have both: chainlora combine {both}" if others else "",
        )


def _entry_with(name: str, history: History) -> str:
    """Return the first entry with a stage and all parts of the head; else the stage."""
    wanted = {*history.parts(history.head), name}
    known = [entry.key for entry in history.entries]
    return next((key for key in known if wanted <= history.below(key)), name)


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
