"""Build what was declared: each entry without a state gets one, in the order of their parents.

The base is opened once. A stage that was stopped goes on; what another process builds is left to
it. Whoever builds the last missing parent of a combination builds that too.
"""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chainlora.errors import ChainLoRAError, RunError, StoppedError, TrainingError
from chainlora.evaluation.combination import build_combination, tell_left_out, told
from chainlora.evaluation.stage_scores import Progress
from chainlora.evaluation.start_rows import build_start
from chainlora.runs.adding import build_import
from chainlora.runs.addresses import begun_stage, state_at
from chainlora.runs.changes import build_mix
from chainlora.runs.declaring import changed, declare, declared_config, withdraw
from chainlora.runs.draft import DRAFT, ended_leftovers
from chainlora.runs.history import START, Entry, History, Unbuilt
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import start_at
from chainlora.runs.locks import is_in_use
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
    tell: Listener,
    change: Collection[str] = (),
    *,
    base: OpenBase | None = None,
    loop: Loop = tuned,
    after: Callable[[Entry], object] = lambda entry: None,
) -> dict[str, TrainResult]:
    """Declare and build what a plan of a run names; return the result of each stage that was
    trained here. `after` is called with each entry that was built.

    An error before a stage has written ``stage.json`` withdraws what the command has declared.
    """
    run, results, is_new_run = plan.run, dict[str, TrainResult](), not exists_in(plan.run)
    wait_for_all()  # all have made their plan
    if is_first_launched():
        declare(run, _with_base(plan, base), plan.new, plan.target, plan.start)
    wait_for_all()
    before = read_history(run)
    for each in (each for each in plan.stages if each.state == "finished"):
        tell(StageBegins(each.step, each.name, each.state, bool(each.stage.beside)))
    for name in {path.parent.name for path in ended_leftovers(run, before)}:
        Work(run, name, writes=is_first_launched()).tidy()
    said: set[str] = set()
    while (entry := _next_due(plan, said)) is not None:
        began = time.monotonic()
        with _withdrawing(plan, entry, is_new_run):
            if entry.kind == "stage":
                results[entry.key] = _train(plan, entry, tell, change, base, loop)
            elif is_first_launched():
                _compute(run, entry, tell, base)
        wait_for_all()
        found = read_history(run).find(entry.key)
        assert found is not None
        seconds, what = time.monotonic() - began, told(read_history(run), entry.key)
        tell(EntryBuilt(0, entry.key, entry.kind, seconds, what))
        after(found)
    if is_first_launched():
        _tell_where_it_is(plan, before)
    return results


def _with_base(plan: Plan, base: OpenBase | None) -> History:
    """Return the planned history, that of a new run with what is known of its base by now."""
    if plan.history.base.files is not None or base is None:
        return plan.history
    first = plan.stages[0].stage.config
    known = {"files": base.files, "dtype": first.train.dtype, "quantize": first.quantize}
    tuned_on = plan.history.base.model_copy(update=known)
    return plan.history.model_copy(update={"base": tuned_on})


@contextmanager
def _withdrawing(plan: Plan, entry: Unbuilt, is_new_run: bool) -> Iterator[None]:
    """Withdraw what a plan has declared where one of its stages is refused before it has learned
    anything, so that another command may follow."""
    try:
        yield
    except BaseException as error:
        folder = stage_folder(plan.run, entry.key)
        is_given = entry.key in (START, *(each.name for each in plan.stages))
        has_begun = (folder / DRAFT).exists() or is_in_use(folder)
        is_stopped = isinstance(error, TrainingError | KeyboardInterrupt)
        if is_first_launched() and is_given and not (has_begun or is_stopped):
            keys = [START] * is_new_run + [entry.key, *(each.key for each in plan.new)]
            with suppress(ChainLoRAError):  # the first error is the one to tell
                withdraw(plan.run, keys, is_new_run=is_new_run)
        raise


def _next_due(plan: Plan, said: set[str]) -> Unbuilt | None:
    """Return the first entry that is due: of those of a command, then of what they are computed
    from, and what is computed from them on the way to the target; all its parents are built.

    `said` are those of which it was said why they are not.
    """
    history, own = read_history(plan.run), {START, *plan.keys}
    wanted = own | {name for key in plan.keys for name in history.below(key)}
    ahead = set() if history.target is None else history.below(history.target)
    for entry in sorted(history.unbuilt, key=lambda entry: entry.key not in own):
        is_computed = entry.kind == "combine" or entry.is_rehearsal
        if not (entry.key in wanted or (entry.key in ahead and is_computed)):
            continue
        if any(history.find(key) is None for key in entry.parents):
            continue
        whose = None if entry.key in own else _left_to(plan.run, entry)
        if whose is None:
            return entry
        if entry.key not in said:
            logger.warning("%s is left to the %s", entry.key, whose)
            said.add(entry.key)
    return None


def _left_to(run: Path, entry: Unbuilt) -> str | None:
    """Say who builds an entry that another command has declared; None for this process."""
    if is_in_use(stage_folder(run, entry.key)):
        return "process that trains it"
    return "command that names its plug-ins" if entry.config.get("plugins") else None


def _train(
    plan: Plan,
    entry: Unbuilt,
    tell: Listener,
    change: Collection[str],
    base: OpenBase | None,
    loop: Loop,
) -> TrainResult:
    """Train a stage that was declared, from where it was stopped."""
    run, name = plan.run, entry.key
    begun = begun_stage(run, name)
    step = 0 if begun is None or begun.draft is None else begun.draft.position.step
    stage = next((each.stage for each in plan.stages if each.name == name), None)
    is_beside = stage is not None and bool(stage.beside)
    tell(StageBegins(step, name, "new" if begun is None else "stopped", is_beside))
    start = start_at(state_at(run, read_history(run), entry.parent))
    is_own = entry == plan.history.declared(plan.new, None).find_unbuilt(name)
    if stage is not None and not is_own:
        raise changed(run)
    config = plan.configs.get(name) if is_own else None
    if config is None:
        config = declared_config(run, entry) if begun is None else begun.config()
        config = config.model_copy(update={"train": config.train.model_copy(update=_NO_TRACKERS)})
        if config.plugins:
            raise RunError(not_named(f"train {name} of {run}", config.plugins))
    with naming(stage if len(plan.stages) > 1 else None):
        return train_stage(name, config, start, tell, change=change, base=base, loop=loop)


_NO_TRACKERS = {"trackers": ()}  # a run may come from somebody else: they are named again


def _compute(run: Path, entry: Unbuilt, tell: Listener, base: OpenBase | None) -> None:
    """Give an entry its state for which nothing is trained."""
    if entry.kind == "combine":
        build_combination(run, entry.key, _solver(tell), base)
    elif entry.kind == "import":
        if entry.key == START:
            build_start(run, entry, base, reader(tell, "writing general rows"))
        else:
            build_import(run, entry, base)
    else:
        build_mix(run, entry.key)


def _tell_where_it_is(plan: Plan, before: History) -> None:
    """Warn of what a run is without, and of what waits for another process."""
    run, history = plan.run, read_history(plan.run)
    if waiting := [key for key in plan.keys if history.find_unbuilt(key) is not None]:
        due = {name for key in waiting for name in history.below(key)} - {*waiting}
        names = [each.key for each in history.unbuilt if each.key in due]
        logger.warning("%s of %s waits for %s", ", ".join(waiting), run, ", ".join(names))
        return
    if history.head != before.head:
        tell_left_out(run, before, history.head, rehearsals=False)
    inside = history.below(history.head)
    for name in (each.name for each in plan.stages if each.name not in inside):
        end = _entry_with(name, history)
        others = [k for k in history.ends(history.head) if k not in history.below(end)]
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
    known = [entry.key for entry in history.entries if entry.kind != "mix"]
    found = [key for key in known if wanted <= history.below(key)]
    found = [key for key in found if history.ends(key) == history.ends(found[0])]
    return found[-1] if found else name


def reader(tell: Listener, doing: str = "scoring kept rows") -> Progress:
    """Return what is called while kept rows are scored or written: it tells, and may stop."""

    def read(what: str, done: int, rows: int) -> None:
        _stop_if_asked(f"{doing}, {what}")
        tell(KeptRowsRead(0, done, done / rows, doing, what))

    return read


def _solver(tell: Listener) -> Progress:
    """Return what is called while a combination is solved: it tells, and may stop."""

    def solved(parts: str, layer: int, layers: int) -> None:
        _stop_if_asked(f"combining {parts}")
        tell(LayerSolved(0, parts, layer, layers))

    return solved


def _stop_if_asked(doing: str) -> None:
    """Raise StoppedError if asked to stop in what the same command does again.

    Several processes must stop alike, so they finish what they have begun.
    """
    number = stop_requested()
    if number is not None and num_launched() == 1:
        got = f"{signal.Signals(number).name} while {doing}"
        raise StoppedError(f"the run stopped (got {got}); the same command goes on", number)
