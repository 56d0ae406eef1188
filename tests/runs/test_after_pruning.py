"""What a run is after a prune: what it was without the stage, by the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import train_all, train_on
from helpers_stages import config_of, killed, section, train_beside

from chainlora.errors import RunError
from chainlora.evaluation.combination import combine
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.history import WEIGHTS, link_folder, rows_file
from chainlora.runs.history_file import read_history
from chainlora.training.stages import build_run, prune


@pytest.fixture
def with_general(tiny_folder, sentiment, tmp_path) -> Path:
    """A run of stage a that keeps rows of its origin."""
    run, rows = tmp_path / "run", {"train": str(sentiment / "train.jsonl")}
    rows["task"] = str(sentiment / "task.yaml")
    train_all(config_of(tiny_folder, sentiment, run) | {"start_data": rows})
    return run


def test_it_is_the_combination_of_the_rest_by_the_same_recipe(ac, sentiment, chainlora):
    """Not an earlier one of the same parts by another recipe."""
    before = combine(ac, ["a", "c"], rank=4, importance={"c": 3}).key
    train_beside(sentiment, ac, "b")
    assert open_run(ac).entry.recipe.rank == 4
    said = chainlora("prune", ac, "b", "--yes")
    assert open_run(ac).key == before
    assert f"{ac} is {before} now" in said.out
    assert "combining" not in said.err


def test_a_stage_on_top_leaves_the_recipe_below_it(ac, sentiment):
    before = combine(ac, ["a", "c"], rank=4).key
    train_beside(sentiment, ac, "b")
    train_on(ac, section(sentiment, "d"))
    prune(ac, "b")
    assert open_run(ac).key == before


def test_a_state_that_was_undone_does_not_come_back(with_general, sentiment):
    combine(with_general)
    undo(with_general)
    train_beside(sentiment, with_general, "b")
    undo(with_general)
    prune(with_general, "b")
    assert open_run(with_general).key == "a"


def test_stages_are_pruned_one_after_the_other(abc, ac, sentiment):
    train_beside(sentiment, abc, "d")
    prune(abc, "d")
    prune(abc, "b")
    assert open_run(abc).state == open_run(ac).state
    prune(abc, "a")
    assert open_run(abc).key == "c"


def test_one_that_waits_is_combined_without_what_it_waited_for(ac, abc, sentiment, tmp_path):
    (plugin := tmp_path / "own.py").write_text("")
    killed("stage", ac, section(sentiment, "d") | {"plugins": [str(plugin)]})
    train_on(ac, section(sentiment, "b"), beside=True)
    assert open_run(ac).key == "after-c"
    prune(ac, "d")
    build_run(ac)
    assert open_run(ac).state == open_run(abc).state


@pytest.mark.parametrize("damaged", ["base", "rows", "links"])
def test_a_prune_that_is_refused_deletes_nothing(abc, ac, tiny_folder, damaged):
    """The combination of the rest is solved before anything is deleted."""
    kept = read_history(abc).find("c")
    places = {
        "base": tiny_folder / "model.safetensors",
        "rows": abc / rows_file(kept.kept),
        "links": abc / link_folder(kept.tied[0]) / WEIGHTS,
    }
    before, whole = checksums(abc), places[damaged].read_bytes()
    places[damaged].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(RunError, match="restore"):
            prune(abc, "b")
    finally:
        places[damaged].write_bytes(whole)
    assert checksums(abc) == before
    prune(abc, "b")
    assert open_run(abc).state == open_run(ac).state


def test_what_cannot_be_combined_again_is_not_pruned(abc, tmp_path, chainlora):
    pulled = tmp_path / "pulled"
    chainlora("push", abc, tmp_path / "pushed")
    chainlora("pull", tmp_path / "pushed", pulled)
    before = checksums(pulled) | {".lock": ""}
    leave = f"chainlora undo {pulled} --to b, then chainlora prune {pulled} a --yes"
    for words in ("--yes", "--json"):
        chainlora("prune", pulled, "a", words).refused("reads kept rows (got none of b, c)", leave)
    assert checksums(pulled) | {".lock": ""} == before
    undo(pulled, to="b")
    prune(pulled, "a")
    assert open_run(pulled).key == "b"


@pytest.mark.parametrize("name", ["a", "b"])
def test_no_entry_names_a_pruned_stage_as_its_unit(name, with_general, sentiment):
    """The rows of the origin have the unit of the first stage."""
    train_beside(sentiment, with_general, "b")
    prune(with_general, name)
    assert f'"{name}"' not in (with_general / "history.json").read_text()


def test_an_earlier_combination_is_deleted_alone(abc, sentiment, chainlora):
    """Disk grows with the square of the stages until this is done."""
    run, head = abc, open_run(abc)
    old = open_run(f"{run}@after-b")
    chainlora("prune", run, "after-c", "--yes").refused("the current state")
    undo(run, to="after-b")  # this undo goes with the combination
    undo(run, to=head.key)
    size = sum(path.stat().st_size for path in (run / "links").rglob("*") if path.is_file())
    assert "would delete" in chainlora("prune", run, "after-b").out
    assert chainlora("prune", run, "after-b", "--yes").status == 0
    left = sum(path.stat().st_size for path in (run / "links").rglob("*") if path.is_file())
    assert left < size
    assert open_run(run).verify().state == head.state
    assert not [entry for entry in read_history(run).entries if "after-b" in entry.parents]
    seen = {undo(run).key for _ in read_history(run).past}
    assert "after-b" not in seen
    undo(run, to="after-c")
    assert combine(run, ["a", "b"]).state == old.state  # to the bit
    undo(run, to="after-c")
    again = next(e.key for e in read_history(run).entries if e.state == old.state)
    train_on(f"{run}@{again}", section(sentiment, "d"))
    undo(run, to="after-c")
    chainlora("prune", run, again, "--yes").refused("an entry is computed from it", "got d")
