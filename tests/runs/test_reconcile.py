"""A plan is edited, products agree with it: any order of commands, killed at any file operation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from faults.injection import Injection
from faults.lives import live
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from chainlora.errors import ChainLoRAError, RunError, TrainingError
from chainlora.runs.products import Made, Versions, read_versions
from chainlora.runs.recipes import How
from chainlora.runs.reconcile import command, current, reconcile, redo, send, undo
from runs.making import (
    EXECUTE,
    Wanted,
    begin,
    everything_in,
    names_in,
    products_of,
    stage,
    text_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
FULL = bool(os.environ.get("CHAINLORA_FULL"))
NAMES = ("alpha", "bravo", "charlie", "delta")
names = strategies.sampled_from(NAMES)
kills = strategies.none() | strategies.integers(0, 70)  # the file operation at which it dies
Edit = Callable[[Versions], Versions]


def extending(name: str, on: tuple[str, ...] | None = (), **keys: str) -> Edit:
    """Return the edit of `extend`: beside the others, on some, or (None) on all."""

    def edit(history: Versions) -> Versions:
        plan = history.plan()
        if plan.find(name) is not None:
            return history
        below = plan.active if on is None else on
        how = plan.how if on is None else How()
        return history.edited(plan.with_stage(stage(name, below, how, **keys)), f"extend {name}")

    return edit


def combining(chosen: tuple[str, ...], **keys: object) -> Edit:
    def edit(history: Versions) -> Versions:
        plan = history.plan()
        return history.edited(plan.combined(chosen or plan.active, How(**keys)), "combine")

    return edit


def pruning(name: str) -> Edit:
    def edit(history: Versions) -> Versions:
        plan = history.plan()
        marks = [own.identity for own in plan.stages if own.name in plan.standing_on([name])]
        return history.edited(plan.without([name]), f"prune {name}", marks)

    return edit


def do(run: Path, words: str, edit: Edit) -> Versions:
    return command(run, words, edit, EXECUTE, finishes=words.startswith("extend"))


def is_now(run: Path) -> list[str]:
    """What the run is: the links of the newest version that is complete."""
    history = read_versions(run)
    place = current(history)
    recipe = history.recipes(place).root
    product = Made(history).product(recipe)
    return [] if product is None else text_of(run, product.state)


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
    steps.append(("prune alpha", pruning("alpha"), want.without("alpha")))
    for words, edit, expected in steps:
        do(run, words, edit)
        assert is_now(run) == expected.texts(), words
    assert read_versions(run).plan().names == ("bravo", "charlie", "echo")
    assert names_in(run, "alpha") == names_in(run, "pairs") == []


def test_a_later_rank_trains_nothing_again(tmp_path):
    run = begin(tmp_path / "run")
    for name in ("alpha", "bravo"):
        do(run, f"extend {name}", extending(name))
    do(run, "extend pairs", extending("pairs", None))
    trained = {k for k, p in products_of(run).items() if p.kind == "train"}
    do(run, "extend charlie", extending("charlie"))
    do(run, "combine", combining((), rank=2))
    assert trained < {k for k, p in products_of(run).items() if p.kind == "train"}
    assert len([p for p in products_of(run).values() if p.kind == "train"]) == 4


def test_one_part_is_itself_or_combined_with_the_origin(tmp_path):
    run = begin(tmp_path / "run")
    do(run, "extend alpha", extending("alpha"))
    (alone,) = is_now(run)
    assert json.loads(alone)[0] == "train"
    do(run, "combine", combining((), always=True))
    (combined,) = is_now(run)
    assert json.loads(combined)[2] == [["origin", None], [[alone], None]]


def test_undo_and_redo_move_and_a_dropped_combination_comes_back(tmp_path):
    run = begin(tmp_path / "run")
    states = [is_now(run)]
    for name in NAMES:
        do(run, f"extend {name}", extending(name))
        states.append(is_now(run))
    assert len([p for p in products_of(run).values() if p.kind == "combine"]) == 2
    for state in states[-2::-1]:
        undo(run, EXECUTE)
        assert is_now(run) == state
    with pytest.raises(RunError, match="Nothing to undo"):
        undo(run, EXECUTE)
    for state in states[1:]:
        redo(run, EXECUTE)
        assert is_now(run) == state


@pytest.mark.parametrize("fails", ["early", "late"])
def test_a_command_that_fails(tmp_path, fails):
    """Before a checkpoint it takes its version back; after one, the stage stays until undone."""
    run = begin(tmp_path / "run")
    do(run, "extend alpha", extending("alpha"))
    before, state = read_versions(run), is_now(run)
    with pytest.raises((RunError, TrainingError)):
        do(run, "extend bravo", extending("bravo", fails=fails))
    assert is_now(run) == state
    if fails == "late":
        for words, edit in (("combine", combining((), rank=2)), ("prune alpha", pruning("alpha"))):
            with pytest.raises(RunError, match="bravo is unfinished"):
                do(run, words, edit)
        undo(run, EXECUTE)
        assert names_in(run, "bravo") == []
    assert read_versions(run) == before


def test_a_copy_is_an_earlier_version(tmp_path):
    run, copy = begin(tmp_path / "run"), tmp_path / "copy"
    do(run, "extend alpha", extending("alpha"))
    send(run, copy, rows=False)
    assert is_now(copy) == is_now(run)
    assert names_in(copy, "/data") == names_in(copy, "rows of alpha") == []
    do(run, "extend bravo", extending("bravo"))
    send(run, copy, rows=True)
    assert is_now(copy) == is_now(run)
    assert everything_in(copy).keys() < everything_in(run).keys()  # alpha's rows stay unsent
    do(copy, "extend charlie", extending("charlie"))
    with pytest.raises(RunError, match="earlier copy"):
        send(run, copy, rows=True)


def test_every_kill_leaves_the_run_before_or_after_and_the_command_ends_it(tmp_path):
    """Killed at each file operation of each command, and then at each one of the repeated one."""
    run, kills = begin(tmp_path / "run"), 0
    steps = [
        ("extend alpha", extending("alpha")),
        ("extend bravo", extending("bravo")),
        ("extend pairs", extending("pairs", None)),
        ("combine", combining(("alpha", "bravo"), rank=2)),
        ("prune alpha", pruning("alpha")),
    ]
    for words, edit in steps:
        whole = Path(shutil.copytree(run, tmp_path / "whole"))
        do(whole, words, edit)
        states = [is_now(run), is_now(whole)]
        for at in count(step=1 if FULL else 6):
            trial = Path(shutil.copytree(run, tmp_path / "trial"))
            end = live(lambda t=trial, w=words, e=edit: do(t, w, e), Injection(trial, "kill", at))
            if end.status == 0:
                shutil.rmtree(trial)
                break
            kills += 1
            assert end.status == -9, end.message
            assert is_now(trial) in states
            do(trial, words, edit)
            assert is_now(trial) == states[1]
            assert products_of(trial) == products_of(whole)
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
        reconcile(self.run, EXECUTE)
        self.wanted = [(Wanted(), -1)]  # each with the place of the one before
        self.at = 0
        self.counts = {"steps": 0, "kills": 0}

    @property
    def want(self) -> Wanted:
        return self.wanted[self.at][0]

    def do(self, words: str, work: Callable[[], object], after: Wanted, kill: int | None) -> None:
        """Do something, perhaps killed and then repeated, that makes the run `after`."""
        self.counts["steps"] += 1
        before = is_now(self.run)
        if kill is not None:
            end = live(work, Injection(self.run, "kill", kill))
            assert end.status in (0, -9), end.message
            self.counts["kills"] += end.status == -9
            assert is_now(self.run) in (before, after.texts())
        work()
        if after != self.want:
            self.wanted.append((after, self.at))
            self.at = len(self.wanted) - 1

    def edit(self, words: str, edit: Edit, after: Wanted, kill: int | None) -> None:
        self.do(words, lambda: do(self.run, words, edit), after, kill)

    @rule(name=names, kill=kills, where=strategies.sampled_from(["beside", "all", "first"]))
    def extend(self, name: str, kill: int | None, where: str) -> None:
        want = self.want
        if name in [own for own, _, _ in want.stages]:
            return
        active = tuple(own for own, _, _ in want.stages if own not in want.off)
        on = () if where == "beside" else active if where == "all" else active[:1]
        new = (name, on, want.rank if where == "all" and on else None)
        after = replace(want, stages=(*want.stages, new))
        given = None if where == "all" else on
        self.edit(f"extend {name}", extending(name, given), after, kill)

    @rule(name=names, fails=strategies.sampled_from(["early", "late"]))
    def fail(self, name: str, fails: str) -> None:
        if name in [own for own, _, _ in self.want.stages]:
            return
        with pytest.raises(ChainLoRAError):
            do(self.run, f"extend {name}", extending(name, fails=fails))
        if fails == "late":
            undo(self.run, EXECUTE)

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
        if name not in [own for own, _, _ in self.want.stages]:
            return
        after = self.want.without(name)
        gone = {own for own, _, _ in self.want.stages} - {own for own, _, _ in after.stages}
        stages = {s.name: s.identity for s in read_versions(self.run).plan().stages}
        self.edit(f"prune {name}", pruning(name), after, kill)
        left = {s.identity for s in read_versions(self.run).stages.values()}
        assert not left & {stages[own] for own in gone}
        self.forget(gone, stages)

    def forget(self, gone: set[str], stages: dict[str, str]) -> None:
        """What was said before of erased stages is not known any more; undo is tried again."""
        history = read_versions(self.run)
        self.wanted = [
            (want_of(history, place), v.before) for place, v in enumerate(history.versions)
        ]
        self.at = history.at

    @rule(kill=kills)
    def undo(self, kill: int | None) -> None:
        place = self.wanted[self.at][1]
        if place < 0:
            return
        before, after = is_now(self.run), self.wanted[place][0]
        undo(self.run, EXECUTE)
        self.at = place
        assert is_now(self.run) == after.texts() or before == []

    @rule()
    def redo(self) -> None:
        later = [place for place, (_, before) in enumerate(self.wanted) if before == self.at]
        if later:
            redo(self.run, EXECUTE)
            self.at = later[-1]

    @rule(rows=strategies.booleans())
    def send(self, rows: bool) -> None:
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        send(self.run, copy, rows=rows)
        assert is_now(copy) == is_now(self.run)
        assert names_in(copy, "/data/") == []

    @rule()
    def build(self) -> None:
        reconcile(self.run, EXECUTE)

    @invariant()
    def is_what_the_plan_says(self) -> None:
        history = read_versions(self.run)
        assert is_now(self.run) == self.want.texts()
        assert history.files.keys() <= everything_in(self.run).keys()
        assert len([p for p in history.products.values() if p.kind == "combine"]) <= 3 + len(
            [s for s in history.stages.values() if len(s.names) > 1]
        )
        bits: dict[str, list[str]] = {}
        for product in history.products.values():
            text = text_of(self.run, product.state)
            assert bits.setdefault(product.state.digest, text) == text


def want_of(history: Versions, place: int) -> Wanted:
    plan = history.plan(place)
    stages = tuple((s.name, s.names, s.how.rank) for s in plan.stages)
    return Wanted(stages, frozenset(plan.off), plan.how.rank)


def test_any_order_of_commands(tmp_path):
    keys = {"max_examples": 100, "stateful_step_count": 30} if FULL else {"max_examples": 8}
    run_state_machine_as_test(
        lambda: Commands(tmp_path),
        settings=settings(
            **{"stateful_step_count": 20, "derandomize": not FULL} | keys,
            database=None,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
