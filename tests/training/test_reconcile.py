"""Commands edit a plan, entries agree with it: in any order, killed at any file operation.

The entries are texts (`training.making`), so that thousands of steps take seconds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Injection
from faults.lives import live
from hypothesis import HealthCheck, Phase, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from chainlora.errors import ChainLoRAError, RunError, TrainingError
from chainlora.runs.changes import redo, undo, work_left
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.hub import push_run
from chainlora.runs.keys import Made
from chainlora.runs.locks import writing
from chainlora.runs.pruning import purge, without_stage
from chainlora.runs.recipes import How
from chainlora.training.reconcile import Change, carry_out, settled
from training.making import (
    EXECUTE,
    Wanted,
    begin,
    content_of,
    entries_of,
    everything_in,
    is_now,
    names_in,
    stage,
    text_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
FULL = bool(os.environ.get("CHAINLORA_FULL"))
NAMES = ("alpha", "bravo", "charlie", "delta")
names = strategies.sampled_from(NAMES)
kills = strategies.none() | strategies.integers(0, 70)  # the file operation at which it dies
Edit = Callable[[History], History]


def extending(name: str, on: tuple[str, ...] | None = (), **keys: Any) -> Edit:
    """Return the edit of `extend`: beside the others, on some, or (None) on all."""

    def edit(history: History) -> History:
        plan = history.plan()
        if plan.find(name) is not None:
            return history
        below = plan.active if on is None else on
        how = plan.how if on is None else How()
        return history.edited(plan.with_stage(stage(name, below, how, **keys)), f"extend {name}")

    return edit


def combining(chosen: tuple[str, ...], **keys: object) -> Edit:
    def edit(history: History) -> History:
        plan = history.plan()
        return history.edited(plan.combined(chosen or plan.active, How(**keys)), "combine")

    return edit


def updating(name: str, edit: int, purge: bool) -> Edit:
    """Return the edit of `update`, after the file of a stage has changed."""

    def change(history: History) -> History:
        stage = history.plan().find(name)
        assert stage is not None
        sources = {"data.train": [content_of(name, edit)]}
        new = stage.model_copy(update={"sources": sources})
        history = history.edited(history.plan().with_changed([new]), f"update {name}")
        return history.marked(history.former) if purge and history.former else history

    return change


def build(run: Path) -> None:
    carry_out(Change(run, read_history(run)), lambda event: None, execute=EXECUTE)


def do(run: Path, words: str, edit: Edit) -> None:
    """Do what a command does, with texts in place of a model."""
    with writing(run):
        history = settled(run, read_history(run))
        if (drafts := drafts_in(run, history)) and not words.startswith(("extend", "update")):
            raise RunError(f"{next(iter(drafts))} is unfinished")
        carry_out(Change(run, edit(history)), lambda event: None, execute=EXECUTE)


def prune(run: Path, name: str) -> None:
    with writing(run):
        history = settled(run, read_history(run))
        change = Change(run, without_stage(run, history, name), pruned=name)
        carry_out(change, lambda event: None, execute=EXECUTE)
        purge(run, name)


# --- examples ---


def test_what_each_command_makes_of_a_run(tmp_path):
    """The table of decision 43."""
    run, want = begin(tmp_path / "run"), Wanted()
    steps: list[tuple[str, Edit, Wanted]] = []
    want = replace(want, stages=(("alpha", (), None),))
    steps.append(("extend alpha", extending("alpha"), want))
    want = replace(want, stages=(*want.stages, ("bravo", (), None)))
    steps.append(("extend bravo", extending("bravo"), want))
    want = replace(want, stages=(*want.stages, ("pairs", ("alpha", "bravo"), None)))
    steps.append(("extend pairs", extending("pairs", None), want))
    want = replace(want, stages=(*want.stages, ("charlie", (), None)))
    steps.append(("extend charlie", extending("charlie"), want))
    want = replace(want, off=frozenset({"pairs", "bravo"}), rank=4)
    steps.append(("combine", combining(("alpha", "charlie"), rank=4), want))
    want = replace(want, stages=(*want.stages, ("echo", ("bravo",), None)))
    steps.append(("extend echo", extending("echo", ("bravo",)), want))
    for words, edit, expected in steps:
        do(run, words, edit)
        assert is_now(run) == expected.texts(), words
    prune(run, "alpha")
    assert is_now(run) == want.without("alpha").texts()
    assert read_history(run).plan().names == ("bravo", "charlie", "echo")
    assert names_in(run, "alpha") == names_in(run, "pairs") == []


def test_a_later_rank_trains_nothing_again(tmp_path):
    run = begin(tmp_path / "run")
    for name in ("alpha", "bravo"):
        do(run, f"extend {name}", extending(name))
    do(run, "extend pairs", extending("pairs", None))
    before = [entry for entry in entries_of(run) if entry.kind == "stage"]
    do(run, "combine", combining((), rank=2))
    do(run, "combine", combining(("alpha", "bravo"), rank=2))
    assert [entry for entry in entries_of(run) if entry.kind == "stage"] == before


def test_an_updated_stage_is_as_if_its_file_had_always_been_so(tmp_path):
    """Stages on top are trained again, others are not; `undo` goes back, a purge leaves nothing."""
    run, never = begin(tmp_path / "run"), begin(tmp_path / "never")
    for each, edit in ((run, 0), (never, 1)):
        do(each, "extend alpha", extending("alpha", edit=edit))
        do(each, "extend bravo", extending("bravo"))
        do(each, "extend pairs", extending("pairs", None))
    before, entries = is_now(run), {entry.digest for entry in read_history(run).entries}
    do(run, "update alpha", updating("alpha", 1, purge=False))
    assert is_now(run) == is_now(never)
    new = [e for e in read_history(run).entries if e.digest not in entries]
    assert sorted(e.kind for e in new) == ["combine", "stage", "stage"]  # bravo is untouched
    now = read_history(run).find("alpha")
    undo(run)
    assert is_now(run) == before
    assert read_history(run).find("alpha") != now  # names are of the current plan
    redo(run)
    assert read_history(run).find("alpha") == now
    do(run, "update alpha", updating("alpha", 1, purge=True))
    assert is_now(run) == is_now(never)
    assert {e.digest for e in entries_of(run)} == {e.digest for e in entries_of(never)}
    assert names_in(run, content_of("alpha", 0)) == []


def test_one_part_is_itself_or_combined_with_the_origin(tmp_path):
    run = begin(tmp_path / "run")
    do(run, "extend alpha", extending("alpha"))
    (alone,) = is_now(run)
    assert json.loads(alone)[0] == "train"
    do(run, "combine", combining((), always=True))
    (combined,) = is_now(run)
    assert json.loads(combined)[2] == [["base", None], [[alone], None]]


def test_undo_and_redo_move(tmp_path):
    run = begin(tmp_path / "run")
    states = [is_now(run)]
    for name in NAMES:
        do(run, f"extend {name}", extending(name))
        states.append(is_now(run))
    for state in states[-2::-1]:
        undo(run)
        assert is_now(run) == state
    with pytest.raises(RunError, match="Nothing to undo"):
        undo(run)
    for state in states[1:]:
        redo(run)
        assert is_now(run) == state


@pytest.mark.parametrize("fails", ["early", "late"])
def test_a_command_that_fails(tmp_path, fails):
    """Before a checkpoint it takes its version back; after one, the stage stays until undone."""
    run = begin(tmp_path / "run")
    do(run, "extend alpha", extending("alpha"))
    before, state = read_history(run), is_now(run)
    with pytest.raises((RunError, TrainingError)):
        do(run, "extend bravo", extending("bravo", fails=fails))
    assert is_now(run) == state
    if fails == "late":
        with pytest.raises(RunError, match="bravo is unfinished"):
            do(run, "combine", combining((), rank=2))
        with pytest.raises(RunError, match="bravo is unfinished"):
            prune(run, "alpha")
        undo(run)
        assert names_in(run, "bravo") == []
    assert read_history(run) == before


def test_a_copy_is_an_earlier_version(tmp_path):
    run, copy = begin(tmp_path / "run"), tmp_path / "copy"
    do(run, "extend alpha", extending("alpha"))
    push_run(run, str(copy))
    assert is_now(copy) == is_now(run)
    assert names_in(copy, "/data") == names_in(copy, "rows of alpha") == []
    do(run, "extend bravo", extending("bravo"))
    push_run(run, str(copy), rows=True)
    assert is_now(copy) == is_now(run)
    assert everything_in(copy) == everything_in(run)
    do(copy, "extend charlie", extending("charlie"))
    with pytest.raises(RunError, match="earlier than the source"):
        push_run(run, str(copy), rows=True)


def test_every_kill_leaves_the_run_before_or_after_and_the_command_ends_it(tmp_path):
    """Killed at each file operation of each command, and then at each one of the repeated one."""
    run, kills = begin(tmp_path / "run"), 0
    steps: list[tuple[str, Edit | None]] = [
        ("extend alpha", extending("alpha")),
        ("extend bravo", extending("bravo")),
        ("extend pairs", extending("pairs", None)),
        ("combine", combining(("alpha", "bravo"), rank=2)),
        ("update bravo", updating("bravo", 1, purge=False)),
        ("update alpha", updating("alpha", 2, purge=True)),
        ("prune alpha", None),
    ]

    def work(run: Path, words: str, edit: Edit | None) -> None:
        prune(run, "alpha") if edit is None else do(run, words, edit)

    for words, edit in steps:
        whole = Path(shutil.copytree(run, tmp_path / "whole"))
        work(whole, words, edit)
        states = [is_now(run), is_now(whole)]
        for at in count(step=1 if FULL else 6):
            trial = Path(shutil.copytree(run, tmp_path / "trial"))
            job = partial(work, trial, words, edit)
            end = live(job, Injection(trial, "kill", at))
            if end.status == 0:
                shutil.rmtree(trial)
                break
            kills += 1
            assert end.status == -9, end.message
            assert is_now(trial) in states
            with suppress(RunError):  # it was pruned to the end
                job()
            assert is_now(trial) == states[1]
            assert entries_of(trial) == entries_of(whole)
            assert everything_in(trial) == everything_in(whole), (words, at)
            shutil.rmtree(trial)
        shutil.rmtree(run)
        whole.rename(run)
    assert kills > (200 if FULL else 30)


# --- any order ---


class Commands(RuleBasedStateMachine):
    folders = count()

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder / str(next(self.folders))
        self.run = begin(self.folder / "run")
        build(self.run)
        self.wanted = [(Wanted(), -1)]  # each with the place of the one before
        self.at = 0
        self.edits = count(1)
        self.counts = {"steps": 0, "kills": 0}

    @property
    def want(self) -> Wanted:
        return self.wanted[self.at][0]

    def do(self, work: Callable[[], object], after: Wanted, kill: int | None) -> None:
        """Do something, perhaps killed and then repeated, that makes the run `after`."""
        self.counts["steps"] += 1
        before = is_now(self.run)
        if kill is not None:
            end = live(work, Injection(self.run, "kill", kill))
            assert end.status in (0, -9), end.message
            self.counts["kills"] += end.status == -9
            assert is_now(self.run) in (before, after.texts())
        if kill is None:
            work()
        else:
            with suppress(RunError):  # it was pruned to the end
                work()
        if after != self.want:
            self.wanted.append((after, self.at))
            self.at = len(self.wanted) - 1

    def edit(self, words: str, edit: Edit, after: Wanted, kill: int | None) -> None:
        self.do(lambda: do(self.run, words, edit), after, kill)

    @rule(name=names, kill=kills, where=strategies.sampled_from(["beside", "all", "first"]))
    def extend(self, name: str, kill: int | None, where: str) -> None:
        want = self.want
        if name in [s.name for s in read_history(self.run).stages.values()]:
            return
        active = tuple(own for own, _, _ in want.stages if own not in want.off)
        on = () if where == "beside" else active if where == "all" else active[:1]
        new = (name, on, want.rank if where == "all" and on else None)
        after = replace(want, stages=(*want.stages, new))
        given = None if where == "all" else on
        self.edit(f"extend {name}", extending(name, given), after, kill)

    @rule(name=names, fails=strategies.sampled_from(["early", "late"]))
    def fail(self, name: str, fails: str) -> None:
        if name in [s.name for s in read_history(self.run).stages.values()]:
            return
        with pytest.raises(ChainLoRAError):
            do(self.run, f"extend {name}", extending(name, fails=fails))
        if fails == "late":
            undo(self.run)

    @rule(chosen=strategies.sets(names), rank=strategies.sampled_from([None, 2, 4]), kill=kills)
    def combine(self, chosen: set[str], rank: int | None, kill: int | None) -> None:
        own = [name for name, _, _ in self.want.stages]
        picked = tuple(name for name in own if name in chosen)
        active = picked or tuple(name for name in own if name not in self.want.off)
        needed = {below for name in active for below in self.want.below(name)}
        after = replace(self.want, off=frozenset({*own} - needed), rank=rank)
        self.edit("combine", combining(picked, rank=rank), after, kill)

    @rule(name=names, kill=kills)
    def prune(self, name: str, kill: int | None) -> None:
        own = [own for own, _, _ in self.want.stages]
        after = self.want.without(name)
        known = {s.name for s in read_history(self.run).stages.values()}
        if name not in own or not known - {name, *({*own} - {own for own, _, _ in after.stages})}:
            return
        gone = {*own} - {own for own, _, _ in after.stages}
        self.do(lambda: prune(self.run, name), after, kill)
        assert not [s for s in read_history(self.run).stages.values() if s.name == name]
        for word in gone - {s.name for s in read_history(self.run).stages.values()}:
            assert names_in(self.run, word) == []
        self.told()

    @rule(name=names, purge=strategies.booleans(), kill=kills)
    def update(self, name: str, purge: bool, kill: int | None) -> None:
        history = read_history(self.run)
        if history.plan().find(name) is None:
            return
        undone = {s.name for s in history.stages.values()} - {*history.plan().names}
        purge = purge and not undone  # `update` refuses it
        former = {s.sources["data.train"][0] for s in history.stages.values()}
        edit = next(self.edits)
        after = replace(self.want, edits={**self.want.edits, name: edit})
        self.edit(f"update {name}", updating(name, edit, purge), after, kill)
        if purge:
            self.told()
            for content in former - {after.content(own) for own, _, _ in after.stages}:
                assert names_in(self.run, content) == []

    def told(self) -> None:
        """Take over what versions say: what was said of erased stages is not known any more."""
        history = read_history(self.run)
        versions = enumerate(history.versions)
        self.wanted = [(want_of(history, place), version.before) for place, version in versions]
        self.at = history.at

    @rule()
    def undo(self) -> None:
        now, at = self.want.texts(), self.at
        while at >= 0 and self.wanted[at][0].texts() == now:
            at = self.wanted[at][1]
        if at >= 0:
            undo(self.run)
            self.at = read_history(self.run).at
            assert is_now(self.run) == self.wanted[at][0].texts()

    @rule()
    def redo(self) -> None:
        with suppress(RunError):
            redo(self.run)
            self.at = read_history(self.run).at

    @rule(rows=strategies.booleans())
    def send(self, rows: bool) -> None:
        if not read_history(self.run).entries:
            return
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        push_run(self.run, str(copy), rows=rows)
        assert is_now(copy) == is_now(self.run)
        assert names_in(copy, "/data/") == []

    @rule()
    def build(self) -> None:
        build(self.run)
        assert not work_left(read_history(self.run))

    @invariant()
    def is_what_the_plan_says(self) -> None:
        history = read_history(self.run)
        assert is_now(self.run) == self.want.texts()
        assert history.files.keys() <= everything_in(self.run).keys()
        made, recipes = Made(history), history.recipes()
        for name in history.plan().names:
            assert history.find(name) == made.entry(recipes.state(name))
        bits: dict[str, list[str]] = {}
        for entry in history.entries:
            text = text_of(self.run, entry.state)
            assert bits.setdefault(entry.state.digest, text) == text


def want_of(history: History, place: int) -> Wanted:
    plan = history.plan(place)
    stages = tuple((s.name, s.names, s.how.rank) for s in plan.stages)
    edits = {s.name: int(s.sources["data.train"][0].rpartition("-")[2][:-1]) for s in plan.stages}
    return Wanted(stages, frozenset(plan.off), plan.how.rank, edits=edits)


def test_any_order_of_commands(tmp_path):
    keys = {"max_examples": 100, "stateful_step_count": 30} if FULL else {"max_examples": 8}
    run_state_machine_as_test(
        lambda: Commands(tmp_path),
        settings=settings(
            **{"stateful_step_count": 20, "derandomize": not FULL} | keys,
            database=None,
            deadline=None,
            suppress_health_check=[*HealthCheck],
            phases=[Phase.generate],
        ),
    )
