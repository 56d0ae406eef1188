"""A pruned stage is nowhere, and the others are what they are without it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import train_all, train_on
from helpers_data import pair_files
from helpers_stages import (
    config_of,
    files_of,
    killed,
    logits,
    section,
    stage_of,
    survey,
    train_beside,
)

from chainlora import export_adapter
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import RunError
from chainlora.evaluation.combination import combine
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.files import checksums
from chainlora.models.identity import cache_dir
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.history import WEIGHTS, link_folder, rows_file
from chainlora.runs.history_file import read_history
from chainlora.runs.inspection import inspect_run
from chainlora.training.stages import build_run, prune, train_stages


def test_a_pruned_stage_is_nowhere_and_later_ones_are_what_they_were_without(three, tmp_path):
    run = tmp_path / "run"
    whole, without = open_run(run), {}
    for names in ("facts,law", "law"):
        own = zip(whole.state.links, whole.facts, strict=True)
        links = tuple(link for link, facts in own if facts.stage in names.split(","))
        state = whole.state.model_copy(update={"links": links})
        without[names] = logits(replace(whole, state=state))
    losses = [row["loss"] for row in inspect_run(run)["links"] if row["stage"] == "law"]
    for stage, left in (("style", "facts,law"), ("facts", "law")):
        own = open_run(f"{run}@{stage}")
        traces = {stage, str(own.entry.kept)[:16], *own.entry.tied, own.state.digest}
        links = zip(own.state.links, own.facts, strict=True)
        traces |= {link for link, facts in links if facts.stage == stage}
        prune(run, stage)
        for path in (path for path in run.rglob("*") if path.is_file()):
            text = f"{path.relative_to(run)} {path.read_bytes().decode(errors='replace')}"
            is_config = path.name == "config.yaml"  # of a later stage: its own data
            assert is_config or not [trace for trace in traces if trace in text], path
        assert torch.equal(logits(run), without[left])
        assert torch.equal(logits(f"{run}@law"), without[left])
        found = inspect_run(run)["links"]
        assert [row["loss"] for row in found if row["stage"] == "law"] == losses
        with pytest.raises(RunError, match=r"a stage must be one of .*name one"):
            open_run(f"{run}@{stage}")
        with pytest.raises(RunError, match="must be one of"):
            prune(run, stage)
    three["stages"] = three["stages"][2:]
    assert [found.state for found in survey(make_stages(three))] == ["finished"]
    assert train_all(three) == [None]
    export_adapter(run, tmp_path / "adapter")  # whose card has no scores of what was pruned
    assert "validation" not in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    with pytest.raises(RunError, match=r"must keep a stage.*its only one"):
        prune(run, "law")


def test_pages_of_a_killed_report_go_with_a_pruned_stage(two, tmp_path, capsys):
    """They show rows. The output says what else stays, as JSON too."""
    run = tmp_path / "run"
    names = ("report.html.123-0.new", "other.html.7-12.new", "matrix.jsonl.9-1.new")
    left = [run / name for name in names]
    for path in left:
        path.write_text("rows of style")
    assert cli(["prune", str(run), "style"]) == 1
    assert f"would delete {left[0]}\n" in capsys.readouterr().out
    copy = shutil.copytree(run, tmp_path / "copy")
    assert cli(["prune", str(run), "style", "--yes"]) == 0
    assert not [path for path in left if path.exists()]
    told = [line[7:] for line in capsys.readouterr().out.splitlines() if line.startswith("stays: ")]
    assert cli(["prune", str(copy), "style", "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["stays"] == told
    assert str(cache_dir() / "rows") in told[-1]


def test_what_tensorboard_shows_of_a_stage_goes_with_it(staged, tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install tensorboard")
    for stage in staged["stages"]:
        stage["train"] = {"trackers": ["tensorboard"]}
    train_all(staged)
    run = tmp_path / "run"
    found = {path.relative_to(run).parts[:2] for path in run.rglob("events.out.*")}
    assert found == {("stages", "facts"), ("stages", "style")}
    prune(run, "style")
    found = {path.relative_to(run).parts[:2] for path in run.rglob("events.out.*")}
    assert found == {("stages", "facts")}
    assert not any(b"more.jsonl" in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_the_name_of_a_pruned_stage_is_free_again(three, tmp_path):
    """The same stage trained again is what it was, since its A is drawn by its name. Files that a
    killed prune has left are no part of it."""
    run, end = tmp_path / "run", open_run(tmp_path / "run").state
    left = shutil.copytree(run / "stages/law", tmp_path / "left")
    prune(run, "law")
    with pytest.raises(RunError, match="got law for style"):
        train_all(three | {"stages": [three["stages"][0], stage_of(three, "law")]})
    shutil.copytree(left, run / "stages/law")
    train_all(three)
    assert open_run(run).verify().state == end


def test_what_was_done_before_a_stage_was_pruned_is_not_done_again(two, tmp_path):
    """Heads that went are no steps of `undo`."""
    run, style = tmp_path / "run", stage_of(two, "style")
    for _ in range(2):
        undo(run, to="facts")
        undo(run, to="style")
        prune(run, "style")
        heads = [open_run(run).state.digest]
        while open_run(run).history.past:
            heads.append(undo(run).state.digest)
        assert len(heads) == len(set(heads))
        undo(run, to="facts")
        train_on(run, style)


def test_scores_of_pairs_are_scored_again_on_another_reference(staged, tmp_path):
    """Where the stage that preferences began on is pruned, the state `base` has the same digest.
    Without the stage of pairs, the run is whole too."""
    staged["stages"][0] |= {"chain": {"ranks": [4], "steps": [8]}, "train": {"lr": 1e-2}}
    staged["stages"][1] |= {"data": pair_files(tmp_path), "train": {"loss": "dpo", "lr": 1e-2}}
    run, path = tmp_path / "run", tmp_path / "run/matrix.jsonl"
    train_stages(make_stages(staged))  # which scores it
    other = shutil.copytree(run, tmp_path / "other")
    prune(other, "style")
    assert open_run(other).verify().stages == ["facts"]
    prune(run, "facts")
    found = stage_matrix(run).grid
    assert found[0][0].value == 0.5  # of the base, which is its own reference now
    path.unlink()
    assert stage_matrix(run).grid == found


def test_a_fork_is_pruned_of_its_parents_stage(three, tmp_path):
    run, fork = tmp_path / "run", tmp_path / "fork"
    own = stage_of(three, "law") | {"name": "new", "output": str(fork)}
    train_on(f"{run}@style", own)
    before = files_of(run)
    prune(fork, "facts")
    assert open_run(fork).stages == ["style", "new"]
    assert list(open_run(fork).kept()) == ["style", "new"]
    with pytest.raises(RunError, match="must be one of style, new"):
        prune(fork, "facts")
    assert files_of(run) == before


def test_a_pruning_from_elsewhere_leaves_the_relative_name_of_the_base(
    staged, tiny_folder, tmp_path, monkeypatch
):
    """So that a run that is moved together with its base still finds it."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    train_all(staged | {"model": "base"})
    monkeypatch.chdir("/")
    prune(tmp_path / "run", "style")
    assert json.loads((tmp_path / "run/history.json").read_text())["base"]["model"] == "base"


def test_what_cannot_be_pruned_is_refused_and_the_command_asks_first(three, tmp_path, capsys):
    run = tmp_path / "run"
    before = files_of(run)
    assert cli(["prune", str(run), "style"]) == 1
    shown = capsys.readouterr()
    assert "would delete" in shown.out
    assert "Nothing deleted. Add --yes." in shown.err
    assert cli(["prune", str(run), "nope", "--yes"]) == 1
    assert cli(["prune", f"{run}@style", "style", "--yes"]) == 2
    assert files_of(run) == before
    assert cli(["prune", str(run), "style", "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stays"][0] == "law, trained on top of it; with data.replay also on its rows"
    assert found["again"] == [f"chainlora extend {run}@facts STAGE.yaml --name law --output FOLDER"]
    assert not any(Path(path).exists() for path in found["files"])


# --- what a run is afterwards: what it was without the stage, by the same recipe ---


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
