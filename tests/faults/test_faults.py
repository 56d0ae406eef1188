"""Every command at every kind of fault, and damage to what it wrote: a sample, or with
``CHAINLORA_FULL=1`` every file operation and many bits.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.training.plan import make_plan
from faults.commands import (
    COMMANDS,
    FAULTS,
    World,
    disturb,
    files_of,
    kill_everywhere,
    make_world,
    repair,
    train_run,
    under_signals,
)
from faults.damage import flips, whole_files
from faults.injection import Injection
from faults.lives import fresh, live, start, wait

FULL = bool(os.environ.get("CHAINLORA_FULL"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
slow = pytest.mark.slow
# Their files are written as those of the others are: without CHAINLORA_FULL, some places are tried.
SAMPLED = {"add", "beside", "build", "combine", "experiment", "forget", "pull", "push", "steps"}
SAMPLED |= {"take in"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterable[World]:
    """Tiny runs, and a config of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make_world(tmp_path_factory.mktemp("faults"))


def sampled(cases: Iterable[Any], count: int) -> list[Any]:
    """Return so many cases, spread by chance but always the same, or all."""
    found = list(cases)
    if FULL or len(found) <= count:
        return found
    return [found[place] for place in sorted(random.Random(0).sample(range(len(found)), count))]


# --- faults at file operations


def try_places(world: World, command: str, kind: str, count: int) -> None:
    operations = world.whole(command).operations
    for place in sampled(range(len(operations)), count):
        wrong = disturb(world, command, kind, place)
        assert not wrong, f"{command} {kind} {place} {operations[place]}: {wrong}"


@pytest.mark.parametrize("command", ["train", "extend", "undo", "prune", "export"])
def test_a_command_that_was_killed_is_typed_again(world, command):
    try_places(world, command, "kill", 1)


@slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_was_killed_anywhere_is_typed_again(world, command):
    if command in SAMPLED and not FULL:
        try_places(world, command, "kill", 3)
        return
    for place, wrong in kill_everywhere(world, command):
        assert not wrong, f"{place} {world.whole(command).operations[place]}: {wrong}"


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        pytest.param(command, kind, marks=() if command == quick else slow)
        for kind, quick in zip(
            FAULTS[1:],
            ("extend", "train", "prune", "train", "undo", "train", "extend"),
            strict=True,
        )
        for command in COMMANDS
        if FULL or command not in SAMPLED
    ],
)
def test_a_command_that_met_another_fault_is_typed_again(world, command, kind):
    try_places(world, command, kind, 1)


# --- other moments


@slow
@pytest.mark.parametrize("number", range(60 if FULL else 3))
def test_a_signal_at_any_moment(world, number):
    """Once, or twice a moment apart."""
    draw = random.Random(number)
    name = draw.choice(["SIGINT", "SIGTERM"])
    waits = [*draw.choice([[], [0.0], [0.02], [0.1]]), draw.uniform(0.0, 2.0)]

    def strike(*_: Any) -> None:
        set_alarm()
        signal.raise_signal(getattr(signal, name))

    def set_alarm() -> None:
        if waits:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, waits.pop()))

    where = world.begin("train", f"moment-{number}")

    def work() -> None:
        signal.signal(signal.SIGALRM, strike)
        set_alarm()
        under_signals(partial(train_run, world, where))
        signal.setitimer(signal.ITIMER_REAL, 0)

    assert not repair(world, "train", where, live(work))


@slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("state", ["new", "resumed"])
def test_several_processes_on_one_output(world, count, state):
    where = world.begin("train", f"several-{count}-{state}")
    whole = world.whole("train")
    if state == "resumed":
        live(partial(train_run, world, where), Injection(where, "kill", len(whole.operations) // 2))

    def late(seconds: float) -> None:
        time.sleep(seconds)
        train_run(world, where)

    draw = random.Random(count)
    ends = [wait(each) for each in [start(partial(late, draw.random())) for _ in range(count)]]
    assert 0 in [end.status for end in ends], ends
    for end in ends:
        assert end.status == 0 or "Cannot write" in end.message, end
    assert files_of(where) == whole.files


# --- damage


@pytest.fixture(scope="module")
def harmed(world) -> dict[str, Path]:
    """What is damaged: a finished run, one that was stopped at a checkpoint, and the base."""
    finished, stopped = world.begin("extend", "finished"), fresh(world.folder / "stopped")
    saving = [i for i, name in enumerate(world.whole("train").operations) if "ts/00000003" in name]
    live(partial(train_run, world, stopped), Injection(stopped, "kill", saving[-1]))
    base = Path(world.tree["model"])
    return {"finished": finished / "run", "stopped": stopped / "run", "base": base}


def no_case_is_wrong(cases: Iterable[tuple[str, Callable[[], str]]]) -> None:
    for case, happen in sampled(cases, 60):
        found = happen()
        assert not found.startswith("wrong"), f"{case}: {found}"


@pytest.mark.parametrize(
    "kind", ["finished", pytest.param("stopped", marks=slow), pytest.param("base", marks=slow)]
)
def test_a_flipped_bit_is_detected_or_harmless(harmed, kind):
    no_case_is_wrong(flips(harmed[kind], 400 if FULL else 5))


@pytest.mark.parametrize("kind", ["finished", pytest.param("stopped", marks=slow)])
def test_a_file_cut_missing_swapped_or_extra_is_detected_or_harmless(harmed, tmp_path, kind):
    no_case_is_wrong(whole_files(harmed[kind], tmp_path))


def test_a_damaged_or_missing_file_of_an_ended_stage_is_refused_in_a_line(world):
    where = world.begin("undo", "damaged")
    third = world.pairs | {"name": "third"}
    stages = [*world.tree["stages"], world.pairs, third]
    stages = make_stages(world.tree | {"output": str(where / "run"), "stages": stages})
    files = checksums(where)
    unharmed, said = set(), ""
    used = open_run(where / "run").state.links
    for name in files:
        if "/links/" in name and name.split("/")[2] not in used:
            continue  # tied after the best point: no later stage depends on it
        path, whole = where / name, (where / name).read_bytes()
        for content in (None, whole[: len(whole) // 2]):  # missing, cut
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            try:
                make_plan(stages)
                unharmed.add(path.name)
            except ChainLoRAError as error:
                said += str(error)
            path.write_bytes(whole)
    assert "\n" not in said
    assert unharmed <= {".lock", ".lock.json", "matrix.jsonl"}
    assert [found.state for found in make_plan(stages).stages] == ["finished", "finished", "new"]
    assert checksums(where) == files
