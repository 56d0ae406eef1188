"""Any order of commands, some of them killed: what a run is then follows from what it has built."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Injection
from faults.lives import live
from helpers import sign, train_on
from helpers_stages import section
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from chainlora.errors import ChainLoRAError
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.changes import has_work, redo, undo
from chainlora.runs.entries import Entry
from chainlora.runs.history_file import read_history
from chainlora.runs.hub import pull_run, push_run
from chainlora.training.stages import build_run, combine, prune

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
FULL = bool(os.environ.get("CHAINLORA_FULL"))
NAMES = "bcd"
kills = strategies.none() | strategies.integers(0, 90)  # the file operation at which it dies
names = strategies.sampled_from(["a", *NAMES])


def die_at_a_stage(event: Any) -> None:
    if event.name == "stage":
        os.kill(os.getpid(), signal.SIGKILL)


class Reference:
    """What stages and their combinations come to in runs that never had others."""

    def __init__(self, run: Path, sentiment: Path) -> None:
        self.run, self._known = run, dict[frozenset[str], str]()
        for name in NAMES:
            train_on(run, section(sentiment, name, steps=[1]), beside=True)

    def state(self, keys: set[str]) -> str:
        """Return the digest of a stage, or of the combination of several."""
        if len(keys) == 1:
            return open_run(f"{self.run}@{min(keys)}").state.digest
        found = frozenset(keys)
        if found not in self._known:
            self._known[found] = combine(self.run, sorted(keys)).state.digest
        return self._known[found]


class Commands(RuleBasedStateMachine):
    folders = count()

    def __init__(self, first: Path, sentiment: Path, reference: Reference, folder: Path) -> None:
        super().__init__()
        self.folder = folder / str(next(self.folders))
        self.run = Path(shutil.copytree(first, self.folder / "run"))
        self.sentiment, self.reference = sentiment, reference
        self.last: tuple[Callable[[], object], str] | None = None
        self.built: dict[str, Entry] = {}
        self.bits: dict[str, list[Any]] = {}

    def do(self, work: Callable[[], object], kill: int | None = None) -> bool:
        """Do something, perhaps killed; say whether it was done. Refused it may be, but nobody
        else is there who could have changed the run."""
        if kill is not None:
            end = live(work, Injection(self.run, "kill", kill))
            assert end.status in (0, 1, -9), end.message
            said = end.message if end.status == 1 else ""
        else:
            try:
                work()
                return True
            except ChainLoRAError as error:
                said = str(error)
        assert "meanwhile" not in said, said
        assert "Cannot write" not in said, said
        return False

    @rule(name=strategies.sampled_from(NAMES), kill=kills)
    def extend(self, name: str, kill: int | None) -> None:
        own = section(self.sentiment, name, steps=[1])
        self.last = lambda: train_on(self.run, own, beside=True), name
        self.do(self.last[0], kill)

    @rule(name=strategies.sampled_from(["b-top", "c-top"]), kill=kills)
    def extend_on_top(self, name: str, kill: int | None) -> None:
        own = section(self.sentiment, name, steps=[1])
        self.last = lambda: train_on(self.run, own, beside=False), name
        self.do(self.last[0], kill)

    @rule()
    def again(self) -> None:
        if self.last is not None and self.do(self.last[0]):
            assert read_history(self.run).find(self.last[1]) is not None

    @rule(kill=kills)
    def build(self, kill: int | None) -> None:
        if self.do(lambda: build_run(self.run), kill) and kill is None:
            assert not has_work(read_history(self.run))

    @rule()
    def undo(self) -> None:
        self.do(lambda: undo(self.run))

    @rule()
    def redo(self) -> None:
        self.do(lambda: redo(self.run))

    @rule(name=names, kill=kills)
    def prune(self, name: str, kill: int | None) -> None:
        self.built = {}
        self.do(lambda: prune(self.run, name), kill)

    @rule(kill=kills)
    def combine(self, kill: int | None) -> None:
        self.do(lambda: combine(self.run), kill)

    @rule()
    def send(self) -> None:
        for source, target in (("run", "sent"), ("sent", "received")):
            to = self.folder / target
            work = push_run if target == "sent" else pull_run
            if self.do(lambda s=source, t=to, w=work: w(str(self.folder / s), str(t))):
                assert open_run(to).verify().state == open_run(self.folder / source).state
                assert not has_work(read_history(to))

    def teardown(self) -> None:
        """A copy whose unbuilt stages name another file of the receiver keeps no row of it."""
        theirs = self.folder / "theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.copytree(self.run, theirs)
        own = section(self.sentiment, "d", steps=[1])
        live(lambda: train_on(theirs, own, beside=True, listener=die_at_a_stage))  # declares it

        def forge(tree: dict[str, Any]) -> None:
            for stage in tree["stages"].values():
                stage["config"]["data"]["train"] = str(self.sentiment / "train.jsonl")

        sign(theirs, forge)
        self.do(lambda: build_run(theirs))
        honest = {e.key: e.kept for e in read_history(self.reference.run).entries}
        for entry in read_history(theirs).entries:
            assert entry.kept == honest.get(entry.key, entry.kept)

    @invariant()
    def is_whole(self) -> None:
        history = read_history(self.run)
        found = {entry.key: entry for entry in history.entries}
        assert found.keys() >= self.built.keys()  # nothing that was built is lost
        assert {key: found[key] for key in self.built} == self.built
        self.built = found
        for key, entry in found.items():
            state = state_at(self.run, history, key)
            state.verify()
            bits = [link.factors.items() for link in state.links()]
            shown = [[(n, f.a.tolist(), f.b.tolist()) for n, f in each] for each in bits]
            assert self.bits.setdefault(entry.state.digest, shown) == shown
            parts = {*entry.parents} if entry.kind == "combine" else {key}
            if parts <= {"a", *NAMES}:
                assert entry.state.digest == self.reference.state(parts)


def test_any_order_of_commands(trained_beside, sentiment, tmp_path):
    reference = Reference(Path(shutil.copytree(trained_beside["a"], tmp_path / "all")), sentiment)
    keys = {"max_examples": 100, "stateful_step_count": 30} if FULL else {"max_examples": 5}
    run_state_machine_as_test(
        lambda: Commands(trained_beside["a"], sentiment, reference, tmp_path),
        settings=settings(
            **{"stateful_step_count": 12, "derandomize": not FULL} | keys,
            database=None,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
