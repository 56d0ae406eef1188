"""Train stages again whose row files have changed: `chainlora.update` (decision 44).

An update is an edit of the plan: a changed stage takes the place of the one of its name.
`reconcile` trains it, and the stages on top of it, again, and combines all. The former entries
stay for `undo`. With `purge` they are marked and deleted, with all that was computed from them,
and a certificate is written outside the run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from chainlora.config.schema import RunConfig
from chainlora.config.staging import Stage as PlannedStage
from chainlora.data.kept import read_kept
from chainlora.data.mixture import example_hashes
from chainlora.data.splits import named_sources
from chainlora.errors import ChainLoRAError, RunError
from chainlora.evaluation.certificate import (
    Counts,
    Hashes,
    begin_certificate,
    certificate_place,
    finish_certificate,
)
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.changes import whole_run
from chainlora.runs.declaring import config_of
from chainlora.runs.documents import need_file
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import rows_file
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING
from chainlora.runs.locks import writing
from chainlora.runs.open_base import OpenBase
from chainlora.runs.recipes import Stage
from chainlora.runs.resuming import source_digests
from chainlora.runs.state import OpenState
from chainlora.training.events import Listener
from chainlora.training.plan import default_epochs
from chainlora.training.reconcile import Change, settled
from chainlora.training.refusing import StagePlan, check_due, check_rows
from chainlora.training.stages import build_and_score, need_idle, with_progress


@dataclass(frozen=True)
class Changed:
    """A stage with its changed files, and the numbers of training rows that came and went."""

    stage: Stage
    config: RunConfig
    files: tuple[str, ...]  # that are read
    # hashes of its training rows; None: not known, since the run kept none
    before: Hashes | None = None
    now: Hashes | None = None

    @property
    def added(self) -> int | None:
        return _num_without(self.now, self.before)

    @property
    def removed(self) -> int | None:
        return _num_without(self.before, self.now)


@dataclass(frozen=True)
class Update:
    """What an update changes."""

    change: Change
    changed: tuple[Changed, ...] = ()
    again: tuple[str, ...] = ()  # stages on top of them, which are trained again too
    missing: Mapping[str, str] = field(default_factory=dict)  # stages whose files are not there
    erased: tuple[str, ...] = ()  # entries that a purge deletes, as they are named now
    counts: Mapping[str, Counts] = field(default_factory=dict)  # of a purge, by stage
    minutes: float | None = None  # of training, as long as the stages took before

    @property
    def is_due(self) -> bool:
        """Say whether there is something to train or to erase."""
        return bool(self.changed or self.erased)


def update(
    run: str | Path,
    names: str | Sequence[str] = (),
    *,
    rows: str | Path | None = None,
    purge: bool = False,
    certificate: str | Path | None = None,
    matrix: bool = True,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> OpenState:
    """Train the stages of a run again whose row files have changed, and combine all.

    Stages on top of them are trained again too, on their own rows; other stages are untouched. The
    result has the bits of a run that was trained on the changed files from the beginning.

    Args:
        run: the run.
        names: stages to look at; by default all. The files of a named stage must be there.
        rows: the file of rows of the one stage that is named, if it lies elsewhere now.
        purge: then delete everything that was computed from the former rows. `undo` cannot bring it
            back.
        certificate: with `purge`, where to write the certificate, a JSON file outside the run; a
            page for readers is written beside it. By default ``RUN-certificate.json``.
        matrix: score kept rows in the new states, as `train` does.
        listener: see `train`.
        progress: see `train`.

    Returns:
        The new state; the old one, if no file has changed.

    Raises:
        RunError: an unknown stage, a missing file of a named stage or of a stage on top, a stage in
            training, or a certificate that exists.
        ChainLoRAError: for everything that `train` refuses.

    Repeat a call that was stopped to resume it.
    """
    folder = whole_run(run)
    place = certificate_place(folder, certificate) if purge else None
    with with_progress(listener, progress) as shown, writing(folder):
        base = OpenBase.of_state(open_run(folder))
        planned = plan_update(folder, names, rows=rows, purge=purge, base=base)
        if place is not None and planned.is_due:
            before = settled(folder, read_history(folder))
            is_again = not planned.changed
            begin_certificate(place, folder, before, planned.counts, again=is_again)
        # a stopped call may lack scores alone
        build_and_score(planned.change, shown, base, matrix=matrix)
        if place is not None:
            finish_certificate(place, folder)
    return open_run(folder)


def plan_update(
    run: Path,
    names: str | Sequence[str] = (),
    *,
    rows: str | Path | None = None,
    purge: bool = False,
    base: OpenBase | None = None,
) -> Update:
    """Return what `update` would change; write nothing. Raises what `update` raises."""
    history = settled(run, read_history(run))
    updated = {history.stages[identity].name for identity in history.former}
    if not {*drafts_in(run, history)} <= {*history.plan().standing_on(updated)}:
        need_idle(run, history, "update")  # else the same update was stopped
    names = [names] if isinstance(names, str) else [*names]
    _need_stages(history, names, rows)
    head = state_at(run, history)
    base = base or OpenBase.of_state(head)
    changed, missing = _found(run, history, names, rows)
    again = _again(run, history, changed)
    _need_no_plugins([*(each.stage for each in changed), *(stage for stage, _ in again)])
    _check(changed, again, head, base)
    changed = [_with_hashes(each, head, base) for each in changed]
    words = " ".join(["update", *(each.stage.name for each in changed)])
    new = history.edited(history.plan().with_changed(each.stage for each in changed), words)
    erased, counts = tuple[str, ...](), dict[str, Counts]()
    if purge and new.former:
        _need_no_undone(run, new)
        new = new.marked(new.former)
        left = {entry.digest for entry in new.erased(new.former).entries}
        erased = tuple(entry.key for entry in history.entries if entry.digest not in left)
        counts = _counts(head, new, changed)
    change = Change(run, new)
    above = tuple(stage.name for stage, _ in again)
    minutes = _minutes(head, changed, above)
    return Update(change, tuple(changed), above, missing, erased, counts, minutes)


# --- what has changed ---


def _need_stages(history: History, names: Sequence[str], rows: str | Path | None) -> None:
    """Raise RunError for unknown stages, and for a file of rows without one stage."""
    known = history.plan().names
    if unknown := [name for name in names if name not in known]:
        rule = f"a stage to update must be one of {', '.join(known) or 'none'}"
        raise RunError(rule, repr(unknown[0]), "name one")
    if rows is not None and len(names) != 1:
        rule, remedy = "a file of rows is given for one stage", "name the stage: update RUN STAGE"
        raise RunError(rule, f"{len(names)} stages", remedy)


def _found(
    run: Path, history: History, names: Sequence[str], rows: str | Path | None
) -> tuple[list[Changed], dict[str, str]]:
    """Return the stages whose files differ from the plan, and those whose files are missing."""
    changed, missing = [], dict[str, str]()
    for stage in history.plan().stages:
        if names and stage.name not in names:
            continue
        config = _with_rows(config_of(run, stage), rows)
        try:
            sources = source_digests(config)
        except ChainLoRAError as error:
            missing[stage.name] = str(error)
            continue
        if sources != stage.sources:
            if stage.default_length:
                config = _with_default_length(config)
            update = {"config": _tree(config), "sources": sources}
            new = stage.model_copy(update=update)
            changed.append(Changed(new, config, tuple(_paths(config))))
    if names and missing:
        _refuse_missing("update", missing)
    return changed, missing


def _refuse_missing(verb: str, missing: Mapping[str, str]) -> None:
    told = "; ".join(f"{name}: {error}" for name, error in missing.items())
    remedy = "Put the files back, or name one: chainlora update RUN STAGE --data.train FILE"
    raise RunError(f"Cannot {verb}: files of stages cannot be read ({told}). {remedy}.")


def _tree(config: RunConfig) -> dict[str, object]:
    return config.model_dump(mode="json", exclude={"output", "start_data"})


def _with_rows(config: RunConfig, rows: str | Path | None) -> RunConfig:
    if rows is None:
        return config
    data = config.data.model_copy(update={"train": str(rows)})
    return config.model_copy(update={"data": data})


def _with_default_length(config: RunConfig) -> RunConfig:
    """Return a config with the length that its rows give, as if it began now."""
    epochs = (default_epochs(config.data),) * len(config.chain.ranks)
    return config.model_copy(update={"chain": config.chain.model_copy(update={"epochs": epochs})})


def _paths(config: RunConfig) -> list[str]:
    """Return the files that a stage reads, to show before they are accepted."""
    sources = [source for each in named_sources(config.data).values() for source in each]
    return [*filter(None, [config.start, *(str(source.path) for source in sources)])]


def _again(
    run: Path, history: History, changed: Sequence[Changed]
) -> list[tuple[Stage, RunConfig]]:
    """Return the stages that stand on changed ones. Raise RunError unless their files are as then.

    They are named before anything is trained: each is trained again from its own files.
    """
    names, plan = [each.stage.name for each in changed], history.plan()
    above = [s for s in plan.stages if s.name in plan.standing_on(names) and s.name not in names]
    found, missing = [], dict[str, str]()
    for stage in above:
        config = config_of(run, stage)
        try:
            differs = source_digests(config) != stage.sources
        except ChainLoRAError as error:
            missing[stage.name] = str(error)
            continue
        if differs:
            rule = f"Cannot update {', '.join(names)}: {stage.name}, which stands on it, is "
            rule += "trained again, and its files have changed too"
            raise RunError(f"{rule}. Name {stage.name} as well.")
        found.append((stage, config))
    if missing:
        _refuse_missing(f"update {', '.join(names)}", missing)
    return found


def _need_no_plugins(stages: Sequence[Stage]) -> None:
    """Raise RunError for a stage with plug-ins: the run may come from somebody else."""
    if names := [stage.name for stage in stages if stage.plugins]:
        rule = f"Cannot update {names[0]}: it was trained with plug-ins, and none is run here"
        raise RunError(f"{rule}. Prune it, then chainlora extend RUN FILE --plugins NAMES.")


def _check(
    changed: Sequence[Changed],
    again: Sequence[tuple[Stage, RunConfig]],
    head: OpenState,
    base: OpenBase,
) -> None:
    """Raise ChainLoRAError for stages that cannot be trained."""
    pairs = [(each.stage, each.config) for each in changed] + [*again]
    planned = [
        StagePlan(PlannedStage(stage.name, config, beside=not stage.names))
        for stage, config in pairs
        if stage.kind == "stage"
    ]
    if planned:
        check_due(planned, NOTHING, head, base)


# --- rows that came and went ---


def _with_hashes(each: Changed, head: OpenState, base: OpenBase) -> Changed:
    """Return a changed stage with the hashes of its rows. Raises DataError for bad rows."""
    splits = check_rows(each.config, base, head.tokenizer())
    now = None if splits is None else np.unique(example_hashes(splits.own))
    return replace(each, before=_seen(head, each.stage.name), now=now)


def _seen(head: OpenState, key: str) -> Hashes | None:
    """Return the hashes of the training rows of an entry, None if they are not there."""
    digest = head.history.keepers([key]).get(key)
    if digest is None or not (head.run / rows_file(digest)).is_file():  # a purge was stopped
        return None
    return read_kept(need_file(head.run, rows_file(digest), digest)).seen


def _num_without(rows: Hashes | None, others: Hashes | None) -> int | None:
    """Return the number of rows that are not among others."""
    return None if rows is None or others is None else len(np.setdiff1d(rows, others))


def _counts(head: OpenState, new: History, changed: Sequence[Changed]) -> dict[str, Counts]:
    """Return the numbers of rows of each stage to purge, before and after."""
    counts, rows = dict[str, Counts](), {each.stage.name: each.now for each in changed}
    for name in dict.fromkeys(new.stages[identity].name for identity in new.former):
        identities = {i for i in new.former if new.stages[i].name == name}
        entries = [e for e in head.history.entries if e.identity in identities]
        known = [hashes for e in entries if (hashes := _seen(head, e.key)) is not None]
        before = np.unique(np.concatenate(known)) if known else None
        now = rows[name] if name in rows else _seen(head, name)
        counts[name] = Counts(
            before=None if before is None else len(before),
            after=None if now is None else len(now),
            removed=_num_without(before, now),
        )
    return counts


def _minutes(head: OpenState, changed: Sequence[Changed], again: Sequence[str]) -> float | None:
    """Return how long training takes, from what it took before; None if that is not known."""
    seconds = 0.0
    rows = {each.stage.name: (each.before, each.now) for each in changed}
    for name in (*rows, *again):
        result = head.at(name).result()
        if result is None:
            return None
        before, now = rows.get(name, (None, None))
        share = len(now) / len(before) if before is not None and now is not None else 1.0
        seconds += result["wall_s"] * share
    return seconds / 60


def _need_no_undone(run: Path, history: History) -> None:
    """Raise RunError while the run holds stages that were undone: they may hold former rows."""
    names = {stage.name for stage in history.stages.values()} - {*history.plan().names}
    if names:
        first, place = min(names), shlex.quote(str(run))
        rule = f"Cannot purge: {first} was undone and is still in {run}"
        remedy = f"chainlora prune {place} {first} deletes it, chainlora redo {place} takes it back"
        raise RunError(f"{rule}. {remedy}.")
