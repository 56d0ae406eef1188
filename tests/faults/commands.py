"""Commands, each met by a fault at one of its file operations, typed again and compared.

Whatever happens, readers find a history that the command without a fault went through too, and all
that it names whole; and the same command again ends with the same files.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from conftest import make_sentiment, make_tiny_folder
from helpers import EVERYTHING
from helpers_data import pair_files
from helpers_export import save_lora

from chainlora import add, export_adapter, export_merged, update
from chainlora.config.staging import make_stages
from chainlora.files import checksums
from chainlora.runs.addresses import state_at, state_of_draft
from chainlora.runs.changes import redo, undo
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import BASE
from chainlora.runs.history_file import read_history
from chainlora.runs.hub import pull_run, push_run
from chainlora.runs.paths import is_run
from chainlora.training.interrupts import interruptible
from chainlora.training.stages import build_run, combine, extension, prune, train_stages
from chainlora_lab import make_experiment, run_cells
from faults.injection import Injection
from faults.lives import End, fresh, live

CHAIN = {"ranks": [2, 2, 2], "alpha": 4, "steps": [2, 2, 1], "target_modules": ["q_proj", "v_proj"]}
TRAIN = {"lr": 1e-2, "batch_size": 2, "gradient_accumulation": 2, "dtype": "bfloat16"}
# Every feature that has state on disk, in as few steps as can be.
SMALL: dict[str, dict[str, Any]] = {
    "chain": EVERYTHING["chain"] | CHAIN | {"init_batches": 1},
    "train": EVERYTHING["train"] | TRAIN | {"eval_every": 1},
}


@dataclass
class World:
    """Where commands are tried: a base, rows, and runs that they are done to."""

    folder: Path
    tree: dict[str, Any]  # a config of one stage
    pairs: dict[str, Any]  # the stage on top of it
    wholes: dict[str, Whole] = field(default_factory=dict)

    def whole(self, name: str) -> Whole:
        """Return what a command comes to without a fault."""
        if name not in self.wholes:
            where = self.begin(name, f"whole-{name}")
            before = seen(where)
            end = live(partial(COMMANDS[name].do, self, where), Injection(where))
            assert end.status == 0, end.message
            assert not [*where.rglob("stage.json")]  # what was trained is published
            states = [before, *({run: timeless(text)} for run, text in end.histories), seen(where)]
            self.wholes[name] = Whole(end.operations, states, files_of(where))
        return self.wholes[name]

    def begin(self, name: str, folder: str) -> Path:
        """Return a folder with the run that a command is done to."""
        where, source = fresh(self.folder / folder), COMMANDS[name].on
        if name in ("take in", "pull"):
            self.begin("forget" if name == "take in" else "undo", "other")  # a run beside
        if source is not None:
            if not (self.folder / source).exists():
                maker = MAKERS[source]
                self.whole(maker)
                shutil.copytree(self.folder / f"whole-{maker}", self.folder / source)
            shutil.copytree(self.folder / source / "run", where / "run")
        if name == "build":  # of a stage that was killed
            place = 2 * len(self.whole("beside").operations) // 3
            live(partial(_beside, self, where), Injection(where, "kill", place))
        return where


@dataclass(frozen=True)
class Whole:
    """A command without a fault: its file operations, what readers can see on the way, all files
    at the end."""

    operations: list[str]
    states: list[dict[str, Any]]
    files: dict[str, Any]


def make_world(folder: Path) -> World:
    """Make a config with all that a run can have on disk: it has rows of its base, keeps rows and
    its best point, and goes on by preferences."""
    base, data = folder / "base", fresh(folder / "data")
    make_tiny_folder(base, num_hidden_layers=1)  # half the time of a life
    make_sentiment(data)
    rows = {key: str(data / f"{key}.jsonl") for key in ("train", "validation")}
    task = {"task": str(data / "task.yaml")}
    tree = SMALL | {
        "model": str(base),
        "start_data": task | {"validation": rows["validation"]},
        "stages": [{"name": "facts", "data": task | rows | {"num_train": 12, "num_validation": 4}}],
    }
    rule = {"loss": "dpo", "lr": 1e-3}
    rule |= {"keep_best": False, "select_metric": "loss"}
    pairs = {"name": "taste", "data": pair_files(data), "train": rule}
    save_lora(folder / "adapter", base)
    return World(folder, tree, pairs | {"chain": {"ranks": [2], "steps": [2], "init": "kaiming"}})


# --- commands ---

Listener = Callable[[Any], None] | None


def train_run(world: World, where: Path, listener: Listener = None) -> None:
    """Train the first stage."""
    tree = world.tree | {"output": str(where / "run")}
    train_stages(make_stages(tree), listener=listener)


def _extend(world: World, where: Path, listener: Listener = None) -> None:
    """Train a second stage, of preferences."""
    train_stages(extension(where / "run", world.pairs), listener=listener)


def _fork(world: World, where: Path, listener: Listener = None) -> None:
    stages = extension(f"{where / 'run'}@facts", world.pairs | {"output": str(where / "fork")})
    train_stages(stages, listener=listener)


def _beside(world: World, where: Path, listener: Listener = None) -> None:
    """Train a stage beside the others, and combine them."""
    own = world.tree["stages"][0]["data"] | {"num_train": 8}
    chain = {"ranks": [2], "steps": [2]}
    stages = extension(where / "run", {"name": "law", "data": own, "chain": chain}, beside=True)
    train_stages(stages, listener=listener)


def _erase(world: World, where: Path, listener: Listener = None) -> None:
    """Train stage `law` again on fewer rows, and erase what came from the former ones."""
    rows = Path(world.tree["stages"][0]["data"]["train"])
    fewer = rows.with_name("fewer.jsonl")
    if not fewer.exists():
        fewer.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    keys: Any = {"rows": fewer, "purge": True, "certificate": where / "certificate.json"}
    update(where / "run", "law", listener=listener, **keys)


def _add(world: World, where: Path, listener: Listener = None) -> None:
    """Add an adapter that was trained elsewhere, and combine it with the stage."""
    rows = world.tree["stages"][0]["data"] | {"num_train": 8}
    add(where / "run", world.folder / "adapter", rows, name="law")


def _experiment(world: World, where: Path, listener: Listener = None) -> None:
    own = world.tree["stages"][0]["data"]
    rows = {"num_train": 8, "num_validation": 4, "num_test": 4}
    files = {"train": own["train"], "validation": own["validation"], "test": own["validation"]}
    tree = {
        "name": "killed",
        "base": {
            "model": world.tree["model"],
            "recipe": {"rank": 2, "steps": 2, "scaling": 2},
            "data": files | rows,
            "chain": {"target_modules": ["q_proj"]},
            "train": {"batch_size": 4},
        },
        "tasks": {"mood": {"data": {"task": own["task"]}}},
        "methods": ["lora", "chain2"],
        "seeds": [0],
        "curve_points": 0,
    }
    run_cells(make_experiment(tree), where / "cells", backend="inline")


@dataclass(frozen=True)
class Command:
    """What a command does, and the run that it is done to; what it does when it is typed again
    after it has ended: the same, something else, or it is refused."""

    do: Callable[..., object]
    on: str | None = None
    again: Literal["same", "other", "refused"] = "same"


COMMANDS = {
    "train": Command(train_run),
    "extend": Command(_extend, "one"),
    "fork": Command(_fork, "one"),
    "beside": Command(_beside, "one"),
    "add": Command(_add, "one"),
    "build": Command(lambda _, at, *__: build_run(at / "run"), "one"),
    "steps": Command(lambda _, at, *__: combine(at / "run", steps=3), "beside"),
    "forget": Command(lambda _, at, *__: prune(at / "run", "law"), "trained", "refused"),
    "combine": Command(
        lambda _, at, *__: combine(at / "run", output=at / "fork"), "beside", "refused"
    ),
    "erase": Command(_erase, "beside"),
    # with another run, whose first stage is the same
    "take in": Command(
        lambda world, at, *_: combine(at / "run", ["facts", world.folder / "beside/run"]), "one"
    ),
    "undo": Command(lambda _, at, *__: undo(at / "run"), "two", "other"),
    "redo": Command(lambda _, at, *__: redo(at / "run"), "undone", "other"),
    "prune": Command(lambda _, at, *__: prune(at / "run", "taste"), "two", "refused"),
    "export": Command(lambda _, at, *__: export_adapter(at / "run", at / "out"), "two", "refused"),
    "merge": Command(lambda _, at, *__: export_merged(at / "run", at / "out"), "two", "refused"),
    "push": Command(lambda _, at, *__: push_run(at / "run", str(at / "fork"), rows=True), "two"),
    "pull": Command(
        lambda world, at, *_: pull_run(str(world.folder / "two/run"), at / "run"), "one"
    ),
    "experiment": Command(_experiment),
}


# of the runs that commands are done to
MAKERS = {"one": "train", "two": "extend", "undone": "undo", "beside": "beside"}
MAKERS |= {"trained": "steps"}


# --- what is there ---


def seen(where: Path) -> dict[str, Any]:
    """Return what readers take for whole: the history of each run, and all of an export.

    Every file that a state depends on is checked, and so is all that a resume would read.
    """
    found: dict[str, Any] = {}
    for run in (where / "run", where / "fork"):
        if is_run(run):
            history = read_history(run)
            if marks := history.versions[history.at].marks:  # of which files may be gone
                history = history.erased(marks)
            states = [
                state_at(run, history, key) for key in (BASE, *(e.key for e in history.entries))
            ]
            states += [state_of_draft(run, name, history) for name in drafts_in(run, history)]
            assert all(state.verify() is state for state in states)  # not even a checkpoint is less
            found[run.name] = timeless((run / "history.json").read_text())
    if (where / "out").exists():
        found["out"] = checksums(where / "out")
    return found


def files_of(where: Path) -> dict[str, Any]:
    """Return all files but what says when and where something was done; of experiments, what they
    scored."""
    if (where / "cells").is_dir():
        lines = (where / "cells/results.jsonl").read_text().splitlines()
        return {"results": list(map(timeless, lines))}
    passing = (".lock.json", "sent.jsonl")  # a kill leaves the holder; copies are noted by place
    found: dict[str, Any] = {n: s for n, s in checksums(where).items() if not n.endswith(passing)}
    for name in found:
        lines = (where / name).read_text(errors="replace").splitlines()
        if name.endswith((".yaml", ".md")):
            found[name] = [line for line in lines if not line.startswith(("output:", "Written"))]
        elif name.endswith((".json", ".jsonl")) and "adapter_config" not in name:
            found[name] = list(map(timeless, lines if name[-1] == "l" else ["".join(lines)]))
    return found


_TIMES = {"seconds", "wall_s", "peak_memory_mb", "peak_rss_mb", "setup_s", "checksum", "files"}
_TIMES |= {"ended", "time", "hardware", "output"}


def timeless(text: str) -> Any:
    return _without_times(json.loads(text))


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}


# --- faults ---

# What happens at an operation; those of LASTING also at each one after it.
FAULTS = ("kill", "tear", "power", "EIO", "ENOSPC", "EROFS", "SIGINT", "SIGTERM")
LASTING = {"ENOSPC", "EROFS", "SIGTERM"}


def disturb(world: World, name: str, kind: str, place: int) -> str:
    """Do a command with a fault, and type it again; return what is wrong then, nothing if all is
    right."""
    where = world.begin(name, f"{name}-{kind}-{place}")
    work = partial(COMMANDS[name].do, world, where)
    injection = Injection(where, kind, place, lasting=kind in LASTING)
    end = live(partial(under_signals, work) if place % 2 and kind[:3] == "SIG" else work, injection)
    if kind == "power" and end.status == -9:
        shutil.rmtree(where)
        where.with_name(f"{where.name}.durable").rename(where)
    if kind == "tear":  # and once more, in what repairs it
        left = len(world.whole(name).operations) - place
        end = live(work, Injection(where, kind, random.Random(place).randrange(left)))
    wrong = repair(world, name, where, end)
    shutil.rmtree(where)
    return wrong


def under_signals(work: Callable[..., None]) -> None:
    """Do a command as the command line does it: a signal lets training finish its step."""
    with interruptible() as interrupts:
        work(lambda event: interrupts.defer() if event.name == "plan" else None)


def kill_everywhere(world: World, name: str) -> Iterator[tuple[int, str]]:
    """Kill a command at each of its file operations, and type it again; yield the operations and
    what is wrong then.

    A kill leaves what is on disk at that instant, so one life is enough, which copies it wherever
    it has changed.
    """
    where = world.begin(name, f"{name}-killed")
    live(partial(COMMANDS[name].do, world, where), Injection(where, "copy"))
    for place in range(len(world.whole(name).operations)):
        copy = where.with_name(f"{where.name}.{place}")
        if copy.exists():
            shutil.rmtree(where)
            copy.rename(where)
            yield place, repair(world, name, where, End(-9))


def repair(world: World, name: str, where: Path, end: End) -> str:
    """Type a command again that has met a fault; return what is wrong, before or then."""
    whole, command = world.whole(name), COMMANDS[name]
    if end.is_unexpected:
        return f"it ended with {end.message[-600:]}"
    found = seen(where)
    for key in ("run", "fork", "out"):
        if found.get(key) not in [state.get(key) for state in whole.states]:
            return f"readers see {key}: {found.get(key)}"
    is_done = found == whole.states[-1]
    if not (is_done and command.again == "other"):
        again = live(partial(command.do, world, where))
        if again.status != 0 and not (is_done and command.again == "refused"):
            return f"the same command ended with {again.status}: {again.message[-600:]}"
    now = files_of(where)
    return ", ".join(
        f"other {each}"
        for each in sorted(whole.files.keys() | now.keys())
        if whole.files.get(each) != now.get(each)
    )
