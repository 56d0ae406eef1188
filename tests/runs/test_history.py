"""Laws of a history: states of one digest are equal to the bit, and nothing of it is ever lost."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import settings
from helpers_cli import Outcome

from chainlora import extend, train
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log, undo
from chainlora.runs.state import OpenState
from chainlora.training.stages import extension, train_stages


@pytest.fixture(scope="module")
def run(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of two stages; tests go on from there and come back."""
    folder = tmp_path_factory.mktemp("history")
    keys = {"ranks": [2, 2], "steps": [1, 1]}
    tree = settings(tiny_folder, sentiment, folder / "run", chain=keys, train={"seed": 1})
    train(tree)
    stage = {"data": tree["data"], "chain": {"ranks": [2], "steps": [1]}}
    (folder / "law.yaml").write_text(json.dumps(stage))
    extend(folder / "run", stage | {"name": "law"}, beside=False)
    return folder / "run"


def added(state: OpenState) -> dict[str, torch.Tensor]:
    """What a state adds to each weight, summed in the order of its links."""
    found: dict[str, torch.Tensor] = {}
    for link in state.links():
        for name in link.factors:
            found[name] = found.get(name, 0) + link.delta_weight(name)
    return found


def assert_equal(one: OpenState, two: OpenState) -> None:
    """Equal digests, and equal to the bit."""
    assert one.state.digest == two.state.digest
    first, second = added(one), added(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_states_of_one_digest_are_equal_to_the_bit(run, tmp_path, chainlora):
    """After `train`, `extend`, `undo`, `redo` and in a fork; and others differ."""

    def done(words: str) -> OpenState:
        found: Outcome = chainlora(words)
        assert found.status == 0, found.err
        return open_run(run)

    main, law = open_run(f"{run}@main"), open_run(run)
    assert_equal(law, open_run(f"{run}@law"))
    assert_equal(done(f"undo {run}"), main)
    assert_equal(done(f"redo {run}"), law)
    assert_equal(done(f"undo {run} --to base"), open_run(f"{run}@base"))
    assert_equal(done(f"undo {run} --to {main.state.digest}"), main)
    assert_equal(done(f"undo {run} --to law"), law)
    assert open_run(f"{run}@{law.state.digest[:8]}").entry == law.entry
    fork = tmp_path / "fork"
    done(f"extend {run}@law {run.parent}/law.yaml --name new --output {fork}")
    assert_equal(open_run(f"{fork}@law"), law)
    assert_equal(open_run(f"{fork}@main"), main)
    again = open_run(f"{fork}@new")
    done(f"undo {run} --to main")
    done(f"extend {run} --on-top {run.parent}/law.yaml --name between")
    done(f"undo {run} --to law")
    done(f"extend {run} --on-top {run.parent}/law.yaml --name new")
    assert_equal(open_run(f"{run}@new"), again)  # whatever else the run holds
    states = [main, law, again, open_run(f"{run}@base")]
    assert len({state.state.digest for state in states}) == 4
    assert not torch.equal(*(next(iter(added(s).values())) for s in (law, main)))


def test_disk_grows_by_as_much_with_each_stage(run, tmp_path):
    """On top of each other: links and rows once each, and a few kB an entry; scores aside."""
    folder = shutil.copytree(run, tmp_path / "run")
    section = json.loads((run.parent / "law.yaml").read_text())
    whole, entries = [], []
    for place in range(4):
        extend(folder, section | {"name": f"again{place}"}, beside=False)
        files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        whole.append(sum(size for path, size in files.items() if path.name != "matrix.jsonl"))
        tensors = sum(size for path, size in files.items() if path.suffix == ".safetensors")
        entries.append(whole[-1] - tensors)
    growth = [after - before for before, after in pairwise(whole)]
    assert max(growth) - min(growth) < 1_000  # bytes: digits of losses and times; a link has more
    assert min(growth) > 2_000
    assert all(after - before < 10_000 for before, after in pairwise(entries))


def test_the_log_marks_the_base(run, chainlora):
    """After `undo --to base` no line had a mark."""
    digest = undo(run, to="base").state.digest
    marked = [line for line in chainlora(f"log {run}").out.splitlines() if line.startswith("*")]
    assert [line.split() for line in marked] == [["*", "base", "base", "0", "none", digest]]
    assert [entry["name"] for entry in log(run) if entry["now"]] == ["base"]
    undo(run, to="law")
    assert "base" not in [entry["name"] for entry in log(run)]


def test_a_stage_that_ends_while_the_run_was_changed_is_published_beside_it(run, chainlora, caplog):
    section = {"name": "late", **json.loads((run.parent / "law.yaml").read_text())}
    assert chainlora(f"undo {run} --to law").status == 0

    def meanwhile(event: Any) -> None:
        if event.name == "step":
            undo(run, to="main")

    train_stages(extension(run, section), listener=meanwhile)
    assert f"to take the stage: chainlora undo {run} --to late" in caplog.text
    assert open_run(run).entry.key == "main"
    assert open_run(f"{run}@late").stages == ["main", "law", "late"]
