"""Classes of faults, each a list of cases; a case does its harm, repairs it as a user would, and
says how that ended.

    right     the result is that of a run without faults, bit for bit
    refused   an error of ours, and nothing was lost: the repaired run is right
    wrong     anything else: another result, a traceback, a run that cannot be resumed
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from injection import Injection
from lives import (
    End,
    config_in,
    difference,
    fresh,
    live,
    outcome,
    run,
    run_with_signals,
    start,
    wait,
)

from chainlora import export_adapter, export_merged

Case = Callable[[], str]  # returns "right", "refused", or "wrong: why"


@dataclass
class World:
    """What all cases share: a base, rows, a folder to work in, and the run without faults."""

    base: Path
    data: Path
    folder: Path
    whole: dict[str, Any]
    operations: list[str]

    def config(self, folder: Path, **sections: Any) -> Any:
        """Return the config of a run in `folder`."""
        return config_in(folder, self.base, self.data, **sections)


def make_world(base: Path, data: Path, folder: Path) -> World:
    """Run without a fault, and count what there is to disturb."""
    where = fresh(folder / "whole")
    config = config_in(where, base, data)
    end = live(partial(run, config), Injection(where))
    assert end.status == 0, end.message
    return World(base, data, folder, outcome(where / "run"), end.operations)


def repaired(world: World, where: Path, end: End) -> str:
    """Resume as a user would, and compare."""
    if end.status == 2 or (end.status == 1 and "unexpected" in end.message):
        return f"wrong: {end.message[-600:]}"
    again = live(partial(run, world.config(where)))
    if again.status != 0:
        return f"wrong: the resume ended with {again.status}: {again.message[-600:]}"
    different = difference(world.whole, outcome(where / "run"))
    if different:
        return f"wrong: other {different}"
    return "refused" if end.status == 1 else "right"


# --- killed, torn, without power, refused by the system, at every operation


def _at_operation(world: World, number: int, kind: str, lasting: bool) -> str:
    where = fresh(world.folder / f"{kind}-{number}")
    injection = Injection(where, kind, number, lasting)
    end = live(partial(run, world.config(where)), injection)
    if kind == "power" and end.status == -9:
        shutil.rmtree(where)
        where.with_name(f"{where.name}.durable").rename(where)
    found = repaired(world, where, end)
    shutil.rmtree(where)
    return found


def at_every_operation(
    world: World, kind: str, lasting: bool = False
) -> Iterator[tuple[str, Case]]:
    """Yield a case for each file operation of a run."""
    for number, name in enumerate(world.operations):
        if kind == "tear" and not _writes(name):
            continue
        yield f"{number} {name}", partial(_at_operation, world, number, kind, lasting)


def _writes(name: str) -> bool:
    kind, _, path = name.partition(" ")
    return kind in ("fsync", "tensors") or (kind == "open" and path.endswith(".jsonl"))


def twice_killed(world: World, seed: int = 0) -> Iterator[tuple[str, Case]]:
    """Yield cases killed once in the run, and once more in its resume."""
    draw = random.Random(seed)
    total = len(world.operations)
    for first in range(0, total, 3):
        second = draw.randrange(max(1, total - first))
        yield f"{first} then {second}", partial(_twice, world, first, second)


def _twice(world: World, first: int, second: int) -> str:
    where = fresh(world.folder / f"twice-{first}-{second}")
    work = partial(run, world.config(where))
    live(work, Injection(where, "kill", first))
    end = live(work, Injection(where, "tear", second))
    found = repaired(world, where, end)
    shutil.rmtree(where)
    return found


def interrupted(world: World) -> Iterator[tuple[str, Case]]:
    """Yield cases of Ctrl-C and SIGTERM at file operations, once, twice, and without handlers."""
    for number, name in enumerate(world.operations):
        for kind, lasting, works in (
            ("SIGINT", False, run_with_signals),
            ("SIGTERM", True, run_with_signals),  # at this operation, and at each one after it
            ("SIGINT", False, run),
        ):
            case = f"{number} {name} {kind} {'again' if lasting else 'once'} {works.__name__}"
            yield case, partial(_interrupted, world, number, kind, lasting, works)


def _interrupted(
    world: World, number: int, kind: str, lasting: bool, work: Callable[[Any], None]
) -> str:
    where = fresh(world.folder / f"interrupted-{number}-{kind}-{lasting}-{work.__name__}")
    end = live(partial(work, world.config(where)), Injection(where, kind, number, lasting))
    found = repaired(world, where, end)
    shutil.rmtree(where)
    return found


# --- exports


def of_exports(world: World) -> Iterator[tuple[str, Case]]:
    """Yield a case for each file operation of an export, merged and as an adapter: killed there, it
    leaves nothing at its output, or all of it."""
    there = fresh(world.folder / "exported")
    end = live(partial(run, world.config(there)))
    assert end.status == 0, end.message
    for to in ("merged", "adapter"):
        where = fresh(world.folder / f"export-{to}")
        counted = live(partial(_export, to, there / "run", where), Injection(where))
        assert counted.status == 0, counted.message
        killed = partial(_killed_export, world, to, there / "run", set(os.listdir(where / "out")))
        for kind in ("kill", "ENOSPC"):
            for number, name in enumerate(counted.operations):
                yield f"{to} {kind} {number} {name}", partial(killed, number, kind)


def _export(to: str, source: Path, where: Path) -> None:
    {"merged": export_merged, "adapter": export_adapter}[to](source, where / "out")


def _killed_export(
    world: World, to: str, source: Path, whole: set[str], number: int, kind: str
) -> str:
    where = fresh(world.folder / f"export-{to}-{kind}-{number}")
    end = live(partial(_export, to, source, where), Injection(where, kind, number, kind != "kill"))
    if end.status == 2:
        return f"wrong: {end.message[-600:]}"
    names = set(os.listdir(where / "out")) if (where / "out").exists() else set()
    again = live(partial(_export, to, source, where))
    if not names and again.status != 0:
        return f"wrong: the export cannot be repeated: {again.message}"
    if names and names != whole:
        return f"wrong: {sorted(names)} at the output"
    shutil.rmtree(where)
    return "refused" if end.status == 1 else "right"


# --- several processes on one output


def several_processes(world: World, seed: int = 0) -> Iterator[tuple[str, Case]]:
    """Yield cases of two and three processes that train into one output."""
    draw = random.Random(seed)
    for count in (2, 3):
        for begun in (False, True):
            for turn in range(4):
                waits = [draw.uniform(0, 0.4) for _ in range(count)]
                name = f"{count} processes, {'resumed' if begun else 'new'}, {turn}"
                yield name, partial(_together, world, count, begun, waits)


def _together(world: World, count: int, begun: bool, waits: list[float]) -> str:
    where = fresh(world.folder / f"several-{count}-{begun}-{waits[0]:.6f}")
    config = world.config(where)
    if begun:
        live(partial(run, config), Injection(where, "kill", len(world.operations) // 2))

    def late(seconds: float) -> None:
        time.sleep(seconds)
        run(config)

    ends = [wait(each) for each in [start(partial(late, seconds)) for seconds in waits]]
    if any(end.status not in (0, 1) for end in ends):
        return f"wrong: {[end.message[-300:] for end in ends]}"
    if not any(end.status == 0 for end in ends):
        return f"wrong: nobody finished: {[end.message for end in ends]}"
    if any(end.status == 1 and not _says_why(end.message) for end in ends):
        return f"wrong: {[end.message for end in ends]}"
    different = difference(world.whole, outcome(where / "run"))
    shutil.rmtree(where)
    return f"wrong: other {different}" if different else "refused"


def _says_why(message: str) -> bool:
    return "one process at a time" in message or "which holds a run" in message


KILLS = {
    "SIGKILL before every file operation": partial(at_every_operation, kind="kill"),
    "SIGKILL in every write": partial(at_every_operation, kind="tear"),
    "SIGKILL twice": twice_killed,
    "power lost before every file operation": partial(at_every_operation, kind="power"),
    "disk full from every file operation on": partial(
        at_every_operation, kind="ENOSPC", lasting=True
    ),
    "read-only from every file operation on": partial(
        at_every_operation, kind="EROFS", lasting=True
    ),
    "EIO at every file operation": partial(at_every_operation, kind="EIO"),
    "export killed or disk full at every file operation": of_exports,
    "two and three processes on one output": several_processes,
    "Ctrl-C or SIGTERM at every file operation": interrupted,
}
