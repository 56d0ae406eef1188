"""Rows for what a run began on: a column for the matrix, and replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Stop, assert_same_links, history_of, settings, stage_dir, stopping
from stages.cases import flipped, logits

from chainlora import evaluate_task, export_adapter, train
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import prune_stage
from chainlora.training.stages import extension, train_stages

SHORT = {"ranks": [4], "steps": [2]}


def general(sentiment: Path, *splits: str) -> dict:
    """Return rows for the start: those of the task, of some splits."""
    rows = {split: str(sentiment / f"{split}.jsonl") for split in splits}
    return {"task": str(sentiment / "task.yaml")} | rows


@pytest.fixture(scope="module")
def trained_once(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run on an adapter: links 0 (the adapter's) and 1 of stage `main`; `start` has no rows."""
    folder = tmp_path_factory.mktemp("made")
    first = settings(tiny_folder, sentiment, folder / "first", chain=SHORT | {"steps": [20]})
    train(first)
    export_adapter(folder / "first", folder / "adapter")
    train(first | {"start": str(folder / "adapter"), "output": str(folder / "mine")})
    return folder


@pytest.fixture
def made(trained_once, tmp_path) -> Path:
    """The folder of a copy of that run, its adapter and the run that this is of."""
    return shutil.copytree(trained_once, tmp_path / "made")


def test_rows_for_an_adapter_are_given_to_a_run_and_count_from_then_on(
    made, sentiment, tmp_path, capsys
):
    run = made / "mine"
    assert cli(["eval", str(run), "--matrix"]) == 0
    said = capsys.readouterr()
    assert f"give rows for it: chainlora eval {run} --matrix --start-rows FILE\n" in said.err
    assert "start (no rows kept)" in said.out
    rows = [str(sentiment / "validation.jsonl"), "--task", str(sentiment / "task.yaml")]
    assert cli(["eval", str(run), "--matrix", "--start-rows", *rows]) == 0
    assert "start (accuracy, 16 validation rows)" in capsys.readouterr().out
    found = stage_matrix(run)
    assert (found.stages, found.states) == (["start", "main"], ["base", "start", "main"])
    for state, row in zip(found.states, found.grid, strict=True):
        score = evaluate_task(f"{run}@{state}")["metrics"]["accuracy"]
        assert [cell.value for cell in row] == [score, score]
    (summary,) = found.summaries()
    assert summary.backward_transfer == found.grid[2][0].value - found.grid[1][0].value
    law = {"name": "law", "data": settings("", sentiment)["data"] | {"replay": 0.5}, "chain": SHORT}
    with pytest.raises(ChainLoRAError, match="replay` needs rows"):  # `start` has none to train on
        train_stages(extension(f"{run}@start", law | {"output": str(tmp_path / "none")}))
    law["data"].pop("replay")
    train_stages(extension(run, law))
    train_stages(extension(run, law | {"name": "fork", "output": str(tmp_path / "fork")}))
    assert open_run(f"{tmp_path}/fork@start").state == open_run(run).state
    prune_stage(run, "main")
    assert stage_matrix(run).stages == ["start", "law"]
    assert stage_matrix(tmp_path / "fork").stages == ["start", "main", "law", "fork"]
    again = stage_matrix(tmp_path / "fork").grid[0][0]
    assert cli(["eval", str(run), "--matrix", "--start-rows", rows[0]]) == 0  # other rows: as text
    assert stage_matrix(run).grid[0][0].metric == "loss"
    assert stage_matrix(tmp_path / "fork").grid[0][0] == again


def test_what_was_before_a_run_is_an_address(made, sentiment, tmp_path):
    run, first = made / "mine", made / "first"
    base = logits(f"{first}@base")
    assert torch.equal(logits(f"{first}@start"), base)
    assert torch.equal(logits(f"{run}@base"), base)
    torch.testing.assert_close(logits(f"{run}@start"), logits(first), atol=1e-5, rtol=0)
    assert not torch.equal(logits(f"{run}@start"), base)
    to = ["--to", "adapter", "--output"]
    assert cli(["export", f"{run}@start", *to, str(tmp_path / "out")]) == 0
    assert cli(["export", f"{first}@start", *to, str(tmp_path / "none")]) == 1
    for verb in (["inspect"], ["report"], ["generate", "--prompt", "a"]):
        assert cli([verb[0], f"{run}@start", *verb[1:]]) == 0
    again = {"name": "again", "data": settings("", sentiment)["data"], "chain": SHORT}
    train_stages(extension(f"{run}@start", again | {"output": str(tmp_path / "fork")}))
    fork = open_run(tmp_path / "fork")
    assert fork.strengths == {"start": 1.0, "again": 1.0}
    assert fork.parent.state == open_run(f"{run}@start").state
    assert list(fork.kept()) == ["again"]
    train_stages(extension(first, again | {"output": str(tmp_path / "of-first")}))
    rows = [str(sentiment / "validation.jsonl"), "--task", str(sentiment / "task.yaml")]
    for _ in range(2):  # rows for it do not change what it is
        assert open_run(f"{tmp_path}/of-first@start").state == open_run(first).state
        assert cli(["eval", f"{tmp_path}/of-first", "--matrix", "--start-rows", *rows]) == 0


def test_rows_of_the_plain_model_are_replayed(tiny_folder, sentiment, tmp_path):
    """In a first stage, on top of the model alone. Killed and resumed, without the files of these
    rows, it ends in the same bits."""
    rows = flipped(sentiment / "train.jsonl", tmp_path / "flipped.jsonl")
    tree = settings(tiny_folder, sentiment, tmp_path / "run", chain=SHORT | {"steps": [30]})
    tree["data"] |= {"train": str(rows), "replay": 0.125}
    own = shutil.copytree(sentiment, tmp_path / "own")
    tree |= {"start_data": general(own, "train", "validation")}
    tree["train"] |= {"save_every": 1}
    killed = tmp_path / "killed"
    stages = make_stages(tree | {"output": str(killed)})
    with pytest.raises(Stop):
        train_stages(stages, listener=stopping(3))
    (tmp_path / "mine.yaml").write_text(json.dumps(tree))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 0
    (own / "validation.jsonl").unlink()
    train_stages(stages)
    assert_same_links(tmp_path / "run", killed)
    result = json.loads((stage_dir(tmp_path / "run") / "result.json").read_text())
    assert result["data"]["train"]["replayed"] == 32
    found = stage_matrix(tmp_path / "run")
    assert found.stages == ["start", "main"]
    assert found.states[:2] == ["base", "main"]
    assert train_stages(stages) == [None]


def test_what_cannot_be_taken_for_rows_of_the_start_is_refused(
    made, trained_once, sentiment, capsys
):
    run, before = made / "mine", checksums(made / "mine")
    file = str(sentiment / "validation.jsonl")
    tree = settings(made / "none", sentiment, run, chain=SHORT | {"steps": [20]})
    tree |= {"start": str(trained_once / "adapter"), "start_data": {"validation": file}}
    del tree["model"]
    with pytest.raises(RunError, match=r"keeps none.*eval .*mine --matrix --start-rows"):
        train(tree)
    for rows, got in (
        ({}, "must name rows"),
        ({"validation": 0.5}, "must name rows"),
        ({"task": "rte", "validation": 0.5}, "`start_data.validation`"),
        ({"train": "a", "validation": "b", "fields": {"no": "x"}}, "`start_data.fields`"),
    ):
        with pytest.raises(ConfigError, match=got):
            train(tree | {"start_data": rows})
    for words, status, got in (
        ([file, "--start-rows", file], 2, "use it with --matrix"),
        ([str(run), "--matrix", "--start-rows", file, "--links", "1"], 2, "leave --links out"),
        ([f"{run}@main", "--matrix", "--start-rows", file], 2, "leave @main out"),
        ([str(run), "--matrix", "--start-rows", "none.jsonl"], 1, "none.jsonl"),
    ):
        assert cli(["eval", *words]) == status
        assert got in capsys.readouterr().err
    assert checksums(run) == before


def test_a_run_is_known_by_what_it_began_on_and_by_the_rows_for_it(
    made, sentiment, tmp_path, chainlora
):
    run, rows = tmp_path / "kept", general(sentiment, "validation")
    tree = settings(made / "first", sentiment, run, chain=SHORT) | {"start_data": rows}
    tree["model"] = history_of(made / "first")["base"]["model"]
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    assert chainlora("train", config).status == 0
    copy = shutil.copytree(run, tmp_path / "copy")
    assert "nothing left to do" in chainlora("train", config, "--output", copy).out
    moved = shutil.copy(sentiment / "validation.jsonl", tmp_path / "renamed.jsonl")
    same = ("--start_data.validation", moved)
    assert "nothing left to do" in chainlora("train", config, *same).out
    other = flipped(sentiment / "train.jsonl", tmp_path / "other.jsonl")
    changed = chainlora("train", config, "--start_data.validation", other)
    changed.refused("`start_data` is read when a run begins")
    moved = stage_dir(copy) / "config.yaml"
    chainlora("train", moved).refused("must be told where it is")
    on_adapter = settings(made / "first", sentiment, made / "mine", chain=SHORT | {"steps": [20]})
    config.write_text(json.dumps(on_adapter | {"model": tree["model"]}))
    chainlora("train", config).refused("`start` must be what the run began on (got none, and ")


def test_what_was_before_a_first_stage_that_was_pruned(made, sentiment, chainlora, tmp_path):
    run, rows = made / "first", general(sentiment, "train")
    train_stages(extension(run, {"name": "more", "data": rows, "chain": SHORT}))
    prune_stage(run, "main")
    report = chainlora(f"report {run}@start --output {tmp_path}/page.html")
    assert report.status == 0
    assert "as it was before this run" in (tmp_path / "page.html").read_text()
    assert "unfinished" not in chainlora(f"inspect {run}@base").out
    config = tmp_path / "config.yaml"
    tree = settings(made, sentiment, run, chain=SHORT | {"steps": [20]})
    tree["model"] = history_of(run)["base"]["model"]
    config.write_text(json.dumps(tree))
    chainlora("train", config).refused("in their order (got main for more")
