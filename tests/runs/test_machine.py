"""Any order of commands, some of them killed: what a run is then follows from what it has built."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Injection
from faults.lives import live
from helpers import sign, train_all, train_on
from helpers_stages import config_of, section
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from chainlora import update
from chainlora.errors import ChainLoRAError
from chainlora.evaluation.certificate import verify_certificate
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.changes import redo, undo, work_left
from chainlora.runs.entries import State
from chainlora.runs.history import History
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


def versioned(sentiment: Path, name: str, version: int, **keys: Any) -> dict[str, Any]:
    """Return a stage on its rows, or (version 1) on all but the third one."""
    own = section(sentiment, name, **keys)
    if version:
        lines = Path(own["data"]["train"]).read_text().splitlines(keepends=True)
        changed = sentiment.with_name(f"{name}-changed.jsonl")
        changed.write_text("".join(lines[:2] + lines[3:]))
        own["data"]["train"] = str(changed)
    return own


def stage_and_version(history: History, key: str) -> tuple[str, int]:
    stage = history.stages[history.find(key).identity]
    return stage.name, int("changed" in stage.config["data"]["train"])


class Reference:
    """What versions of stages and their combinations come to in runs that never had others."""

    def __init__(self, tiny_folder: Path, sentiment: Path, folder: Path) -> None:
        self.tiny_folder, self.sentiment, self.folder = tiny_folder, sentiment, folder
        self._known = dict[frozenset[tuple[str, int]], str]()

    def run(self, versions: Mapping[str, int], names: str = NAMES) -> Path:
        """Return a run of `a` and other stages, each in one version."""
        run = self.folder / "-".join([names, *(f"{n}{version}" for n, version in versions.items())])
        if not run.exists():
            config = config_of(self.tiny_folder, self.sentiment, run)
            config["stages"] = [versioned(self.sentiment, "a", versions.get("a", 0))]
            train_all(config)
            for name in names:
                own = versioned(self.sentiment, name, versions.get(name, 0), steps=[1])
                train_on(run, own, beside=True)
        return run

    def state(self, stages: set[tuple[str, int]]) -> str:
        """Return the digest of a stage, or of the combination of several."""
        found = frozenset(stages)
        if found not in self._known:
            run = self.run({name: version for name, version in sorted(stages) if version})
            names = sorted(name for name, _ in stages)
            made = combine(run, names) if len(names) > 1 else open_run(f"{run}@{names[0]}")
            self._known[found] = made.state.digest
        return self._known[found]


class Commands(RuleBasedStateMachine):
    folders = count()

    def __init__(self, reference: Reference, folder: Path) -> None:
        super().__init__()
        self.folder = folder / str(next(self.folders))
        self.run = Path(shutil.copytree(reference.run({}, "b"), self.folder / "run"))
        self.sentiment, self.reference = reference.sentiment, reference
        self.last: tuple[Callable[[], object], str] | None = None
        self.built: dict[str, State] = {}
        self.certificates = count()
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
            assert not work_left(read_history(self.run))

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

    @rule(name=strategies.sampled_from("ab"), version=strategies.booleans(), kill=kills)
    def update(self, name: str, version: bool, kill: int | None) -> None:
        rows = versioned(self.sentiment, name, version)["data"]["train"]
        self.last = lambda: update(self.run, name, rows=rows), name
        self.do(self.last[0], kill)

    @rule(name=strategies.sampled_from("ab"), version=strategies.booleans(), kill=kills)
    def purge(self, name: str, version: bool, kill: int | None) -> None:
        rows = versioned(self.sentiment, name, version)["data"]["train"]
        place, self.built = self.folder / f"{next(self.certificates)}.json", {}
        keys = {"rows": rows, "purge": True, "certificate": place}
        self.last = lambda: update(self.run, name, **keys), name
        if self.do(self.last[0], kill) and place.exists():
            assert verify_certificate(self.run, place) == []

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
                assert not work_left(read_history(to))

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
        honest = {e.key: e.kept for e in read_history(self.reference.run({})).entries}
        assert {e.kept for e in read_history(theirs).entries if e.key == "d"} <= {honest["d"]}

    @invariant()
    def is_whole(self) -> None:
        history = read_history(self.run)
        found = {entry.digest: entry.state for entry in history.entries}
        assert found.items() >= self.built.items()  # nothing that was built is lost
        is_erasing = any(version.marks for version in history.versions)  # a prune was killed
        self.built = {} if is_erasing else found
        for entry in history.entries:
            state = state_at(self.run, history, entry.key)
            state.verify()
            bits = [link.factors.items() for link in state.links()]
            shown = [[(n, f.a.tolist(), f.b.tolist()) for n, f in each] for each in bits]
            assert self.bits.setdefault(entry.state.digest, shown) == shown
            parts = {*entry.parents} if entry.kind == "combine" else {entry.key}
            stages = {stage_and_version(history, part) for part in parts}
            if {name for name, _ in stages} <= {"a", *NAMES}:
                assert entry.state.digest == self.reference.state(stages)


def test_any_order_of_commands(tiny_folder, sentiment, tmp_path):
    reference = Reference(tiny_folder, sentiment, tmp_path)
    keys = {"max_examples": 100, "stateful_step_count": 30} if FULL else {"max_examples": 5}
    run_state_machine_as_test(
        lambda: Commands(reference, tmp_path),
        settings=settings(
            **{"stateful_step_count": 12, "derandomize": not FULL} | keys,
            database=None,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
