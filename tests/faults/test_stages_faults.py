"""Verbs of stages, killed or refused by the system at file operations: typed again, the same bits.

Whatever happens, the run is loaded as it was before the verb, or as it is after it. All operations
with ``CHAINLORA_FULL=1``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sentiment, make_tiny_folder
from helpers import as_format_2, assert_same_links, settings
from helpers_data import pair_files
from helpers_processes import assert_close_links, launch
from injection import Injection
from lives import End, fresh, live

from chainlora import export_adapter, make_config, train
from chainlora.cli.main import run as command
from chainlora.config.stages import is_run, make_stages
from chainlora.errors import ChainLoRAError, RunError
from chainlora.files import checksums, write_json
from chainlora.models.identity import tokenizer_files
from chainlora.runs.loading_start import with_start
from chainlora.runs.changes import prune_stage
from chainlora.runs.stages import alone_in, mix_stages, open_run
from chainlora.training.stages import extension, train_stages
from chainlora.training.survey import survey

FULL = bool(os.environ.get("CHAINLORA_FULL"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


@dataclass
class World:
    """A config of two stages, and runs of its first one and of both, which the verbs copy."""

    folder: Path
    tree: dict[str, Any]
    whole: dict[str, tuple[End, Any, Any]] = field(default_factory=dict)  # verbs without a fault


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Make a chain with all that a stage can have on disk: it begins on an adapter with a tokenizer
    of its own, keeps rows and its best point, and goes on by preferences."""
    folder = tmp_path_factory.mktemp("stages")
    base, data = folder / "base", fresh(folder / "data")
    make_tiny_folder(base, num_hidden_layers=1)
    make_sentiment(data)
    tree = settings(base, data, chain={"ranks": [2], "steps": [1]})
    end = live(partial(_make_adapter, tree, folder / "adapter"))
    assert end.status == 0, end.message
    rows = tree.pop("data") | {"num_train": 12, "num_validation": 4}
    tree["train"] = {"lr": 1e-2, "batch_size": 4, "save_every": 1}
    keep = {"keep_best": True, "select_metric": "loss", "eval_every": 1}
    pairs = {"data": pair_files(data), "chain": {"ranks": [2], "steps": [2]}}
    tree |= {
        "start": str(folder / "adapter"),
        "chain": {"alpha": 4, "target_modules": ["q_proj"]},
        "stages": [
            {"name": "facts", "data": rows, "chain": {"ranks": [2, 2], "steps": [2, 1]}}
            | {"train": keep},
            {"name": "taste", "train": {"loss": "dpo", "lr": 1e-3}} | pairs,
        ],
    }
    found = World(folder, tree)
    for name, count in (("one", 1), ("two", 2)):
        end = live(partial(_train, found, fresh(folder / name), count))
        assert end.status == 0, end.message
    return found


def _make_adapter(tree: dict[str, Any], folder: Path) -> None:
    run = folder.with_name("adapter-run")
    train(make_config(tree | {"output": str(run)}))
    export_adapter(run, folder)
    for path in tokenizer_files(Path(tree["model"])):
        shutil.copy(path, folder)


# --- verbs ---


def _train(world: World, where: Path, count: int = 2) -> None:
    tree = world.tree | {"stages": world.tree["stages"][:count], "output": str(where / "run")}
    train_stages(make_stages(with_start(tree)))


def _extend(world: World, where: Path) -> None:
    train_stages(extension(where / "run", world.tree["stages"][1]))


def _fork(world: World, where: Path) -> None:
    own = world.tree["stages"][1] | {"output": str(where / "fork")}
    train_stages(extension(f"{where / 'run'}@facts", own))


def _mix(world: World, where: Path) -> None:
    mix_stages(where / "run", {"facts": 0.5, "taste": 0})


def _prune(world: World, where: Path, stage: str = "facts") -> None:
    prune_stage(where / "run", stage)


# Verb → what it does, and the run that it is done to.
VERBS: dict[str, tuple[Callable[[World, Path], None], str | None]] = {
    "train": (_train, None),
    "extend": (_extend, "one"),
    "fork": (_fork, "one"),
    "mix": (_mix, "two"),
    "prune": (_prune, "two"),
}


def _begin(world: World, verb: str, name: str) -> Path:
    where, source = fresh(world.folder / name), VERBS[verb][1]
    if source is not None:
        shutil.copytree(world.folder / source / "run", where / "run")
    return where


def _loaded(where: Path) -> Any:
    """Return what readers see of the run, and of the fork: links by id, with their strengths."""

    def links(run: Path) -> Any:
        reader = open_run(run)
        found = {link.id: (link.strength, link.factors) for link in reader.load_links()}
        return [(i, s, [pair.b.sum().item() for pair in f.values()]) for i, (s, f) in found.items()]

    return [links(where / name) if is_run(where / name) else None for name in ("run", "fork")]


def _bytes(where: Path) -> dict[str, Any]:
    """Return all files but what says when and where something was done."""
    found: dict[str, Any] = checksums(where)
    for name in found:
        if name.endswith((".json", ".jsonl", ".yaml")) and "adapter_config" not in name:
            text = (where / name).read_text()
            lines = text.splitlines() if name.endswith("l") else [json.dumps(json.loads(text))]
            found[name] = [_timeless(line) for line in lines]
    return found


def _timeless(line: str) -> Any:
    if line.startswith(("output:", "start:")):
        return None
    if not line.startswith("{"):
        return line
    return _without_times(json.loads(line))


def _without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    timed = {"seconds", "wall_s", "peak_memory_mb", "checksum", "records", "files", "setup_s"}
    return {k: _without_times(v) for k, v in value.items() if k not in timed}


# --- faults ---


def _whole(world: World, verb: str) -> tuple[End, Any, Any]:
    """Do a verb without a fault; return its file operations, what is there then, what is loaded."""
    if verb not in world.whole:
        where = _begin(world, verb, f"whole-{verb}")
        end = live(partial(VERBS[verb][0], world, where), Injection(where))
        assert end.status == 0, end.message
        world.whole[verb] = end, _bytes(where), _loaded(where)
    return world.whole[verb]


def _disturb(world: World, verb: str, kind: str, place: int) -> str:
    """Do a verb with a fault, and type it again; say what is wrong then."""
    _, files, after = _whole(world, verb)
    where, work = _begin(world, verb, f"{verb}-{kind}-{place}"), partial(VERBS[verb][0], world)
    before = _loaded(where)
    end = live(partial(work, where), Injection(where, kind, place, kind == "ENOSPC"))
    if end.status == 2 or "unexpected" in end.message:
        return end.message
    if before[0] is not None and (found := _loaded(where)) not in (before, after):
        seen = [now in pair for now, *pair in zip(found, before, after, strict=True)]
        if verb != "fork" or not seen[0]:
            return f"readers see {found}"
    again = live(partial(work, where))
    if again.status != 0:
        return f"the same command ended with {again.status}: {again.message[-600:]}"
    other, now = [], _bytes(where)
    other += [name for name in files.keys() | now.keys() if files.get(name) != now.get(name)]
    shutil.rmtree(where)
    return f"other {', '.join(sorted(other))}" if other else ""


def _sample(verb: str, kinds: list[str], size: int, world: World) -> list[tuple[str, int]]:
    count = len(_whole(world, verb)[0].operations)
    found = [(kind, place) for kind in kinds for place in range(count)]
    return found if FULL or size >= len(found) else random.Random(verb).sample(found, size)


@pytest.mark.parametrize(
    ("verb", "size"),
    [
        ("extend", 4),
        ("mix", 2),
        ("prune", 4),
        pytest.param("extend", 8, marks=pytest.mark.slow),
        pytest.param("fork", 6, marks=pytest.mark.slow),
        pytest.param("mix", 99, marks=pytest.mark.slow),
        pytest.param("prune", 40, marks=pytest.mark.slow),
        pytest.param("train", 6, marks=pytest.mark.slow),
    ],
)
def test_a_verb_that_met_a_fault_is_typed_again(world, verb, size):
    for kind, place in _sample(verb, ["kill", "tear", "ENOSPC"], size, world):
        wrong = _disturb(world, verb, kind, place)
        assert not wrong, f"{kind} {place} {_whole(world, verb)[0].operations[place]}: {wrong}"


# --- what else can be wrong ---


def test_a_damaged_or_missing_file_of_an_ended_stage_is_refused_in_a_line(world):
    where = _begin(world, "mix", "damaged")
    third = extension(where / "run", {**world.tree["stages"][1], "name": "third"})
    files = checksums(where)
    unharmed, said = set(), ""
    for name in files:
        path, whole = where / name, (where / name).read_bytes()
        for harm, content in (("missing", None), ("cut", whole[: len(whole) // 2])):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            try:
                survey(third)
                unharmed.add((path.name, harm))
            except ChainLoRAError as error:
                said += str(error)
            path.write_bytes(whole)
    assert "\n" not in said
    # Without stages.json the same command names a stage as ended again.
    others = {each for each in unharmed if each[0] in (".lock", "matrix.jsonl")}
    assert unharmed - others == {("metrics.jsonl", "missing"), ("stages.json", "missing")}
    assert [found.state for found in survey(third)] == ["finished", "finished", "new"]
    assert checksums(where) == files


def test_stages_of_a_run_are_changed_by_one_process_at_a_time(world):
    where = _begin(world, "extend", "busy")
    before, late = _bytes(where), {**world.tree["stages"][1], "name": "late"}
    with alone_in(where / "run"):
        for verb in (_extend, _mix):
            with pytest.raises(RunError, match="by one process at a time"):
                verb(world, where)
    assert _bytes(where) == before

    def meanwhile(event: Any) -> None:
        if event.name == "stage" and event.state == "finished":
            _extend(world, where)

    with pytest.raises(RunError, match="in their order"):
        train_stages(extension(where / "run", late), listener=meanwhile)
    assert [link.stage for link in open_run(where / "run").manifest().links][-1] == "taste"


def test_a_run_of_version_0_2_is_extended(world, tmp_path):
    data = world.tree["stages"][0]["data"] | {"keep_rows": False}
    for name in ("new", "old"):
        tree = settings(world.tree["model"], world.folder / "data", tmp_path / name, data=data)
        train(make_config(tree | {"chain": {"ranks": [2, 2], "steps": [1, 1], "init": "gradient"}}))
    as_format_2(tmp_path / "old")
    before = checksums(tmp_path / "old")
    for name in ("new", "old"):
        train_stages(extension(tmp_path / name, world.tree["stages"][1]))
    after = checksums(tmp_path / "old")
    assert {name: after[name] for name in before} == before
    assert_same_links(tmp_path / "new/stages/taste", tmp_path / "old/stages/taste")
    entries = open_run(tmp_path / "old").manifest().links
    assert [(e.id, e.stage) for e in entries] == [(0, "main"), (1, "main"), (2, "taste")]


@pytest.mark.slow
def test_stages_in_two_processes_are_those_of_one(world, tmp_path):
    first, second = world.tree["stages"]
    first = first | {"chain": {"ranks": [4], "steps": [3]}}
    shared = {key: value for key, value in world.tree.items() if key != "start"}
    tree = shared | {"stages": [first, second], "train": {"lr": 1e-3, "batch_size": 4}}
    for name in ("one", "two"):
        write_json(tmp_path / f"{name}.yaml", tree | {"output": str(tmp_path / name)})
    assert command(["train", str(tmp_path / "one.yaml")]) == 0
    jobs = [{"command": ["train", str(tmp_path / "two.yaml")]}] * 2  # again: nothing is left
    done = launch(2, tmp_path, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("nothing left to do") == 1
    assert_close_links(tmp_path / "one/stages/taste", tmp_path / "two/stages/taste")
