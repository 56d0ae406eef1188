"""Rows of a run's base: a column for the matrix, and replay."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_folder, write_rows
from faults.lives import live
from helpers import Stop, assert_same_links, flip_last_bit, settings, stage_dir, stopping
from helpers_stages import at, die, files_of, flipped, logits

from chainlora import evaluate_task, export_adapter, load_run, train
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.training.stages import combine, extension, prune, train_stages

SHORT = {"ranks": [4], "steps": [2]}


def general(sentiment: Path, *splits: str) -> dict:
    """Return rows for the start: those of the task, of some splits."""
    rows = {split: str(sentiment / f"{split}.jsonl") for split in splits}
    return {"task": str(sentiment / "task.yaml")} | rows


@pytest.fixture(scope="module")
def trained_once(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of one stage, `main`, that has no rows of its base."""
    run = tmp_path_factory.mktemp("made") / "run"
    train(settings(tiny_folder, sentiment, run, chain=SHORT | {"steps": [20]}))
    return run


@pytest.fixture
def made(trained_once, tmp_path) -> Path:
    """A copy of that run."""
    return shutil.copytree(trained_once, tmp_path / "made")


def test_rows_for_the_base_are_given_to_a_run_and_count_from_then_on(
    made, sentiment, tmp_path, capsys
):
    run = made
    rows = [str(sentiment / "validation.jsonl"), "--task", str(sentiment / "task.yaml")]
    assert cli(["eval", str(run), "--matrix", "--start-rows", *rows]) == 0
    assert "base (accuracy, 16 validation rows)" in capsys.readouterr().out
    found = stage_matrix(run)
    assert (found.stages, found.states) == (["base", "main"], ["base", "main"])
    for state, row in zip(found.states, found.grid, strict=True):
        score = evaluate_task(f"{run}@{state}")["metrics"]["accuracy"]
        assert [cell.value for cell in row] == [score, score]
    (summary,) = found.summaries()
    assert summary.backward_transfer == found.grid[1][0].value - found.grid[0][0].value
    law = {"name": "law", "data": settings("", sentiment)["data"] | {"replay": 0.5}, "chain": SHORT}
    with pytest.raises(ChainLoRAError, match="replay` needs rows"):  # `start` has none to train on
        train_stages(extension(f"{run}@start", law | {"output": str(tmp_path / "none")}))
    law["data"].pop("replay")
    train_stages(extension(run, law))
    train_stages(extension(run, law | {"name": "fork", "output": str(tmp_path / "fork")}))
    prune(run, "law")
    assert stage_matrix(run).stages == ["base", "main"]
    assert stage_matrix(tmp_path / "fork").stages == ["base", "main", "law", "fork"]
    again = stage_matrix(tmp_path / "fork").grid[0][0]
    assert cli(["eval", str(run), "--matrix", "--start-rows", rows[0]]) == 0  # other rows: as text
    assert stage_matrix(run).grid[0][0].metric == "loss"
    assert stage_matrix(tmp_path / "fork").grid[0][0] == again


def test_what_was_before_a_run_is_an_address(made, sentiment, tmp_path):
    assert torch.equal(logits(f"{made}@start"), logits(f"{made}@base"))
    assert not torch.equal(logits(f"{made}@start"), logits(made))
    to = ["--to", "adapter", "--output"]
    assert cli(["export", f"{made}@start", *to, str(tmp_path / "none")]) == 1
    for verb in (["inspect"], ["report"], ["generate", "--prompt", "a"]):
        assert cli([verb[0], f"{made}@start", *verb[1:]]) == 0
    again = {"name": "again", "data": settings("", sentiment)["data"], "chain": SHORT}
    train_stages(extension(f"{made}@start", again | {"output": str(tmp_path / "fork")}))
    fork = open_run(tmp_path / "fork")
    assert (fork.stages, list(fork.kept())) == (["again"], ["again"])
    assert fork.parent.state == open_run(f"{made}@start").state


def test_rows_of_the_plain_model_are_replayed(tiny_folder, sentiment, tmp_path):
    """In a first stage, on top of the model alone. Killed and resumed, without the files of these
    rows, it ends in the same bits."""
    rows = flipped(sentiment / "train.jsonl", tmp_path / "flipped.jsonl")
    tree = settings(tiny_folder, sentiment, tmp_path / "run", chain=SHORT | {"steps": [30]})
    tree["data"] |= {"train": str(rows), "replay": 0.125, "keep_conflicts": True}
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
    assert found.stages == ["base", "main"]
    assert found.states[:2] == ["base", "main"]
    assert train_stages(stages) == [None]


def test_rows_for_the_start_are_read_by_the_tokenizer_of_the_run_s_base(
    sentiment, tmp_path, chainlora
):
    """Those of another base replaced the old rows, before scoring refused it."""
    base, run = make_tiny_folder(tmp_path / "base"), tmp_path / "run"
    tree = settings(base, sentiment, run, chain=SHORT)
    train(tree | {"start_data": general(sentiment, "validation")})
    before, file = checksums(run), base / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    said = chainlora("eval", run, "--matrix", "--start-rows", sentiment / "train.jsonl")
    said.refused("must be the one", "another tokenizer.json")
    assert checksums(run) == before


def test_what_cannot_be_taken_for_rows_of_the_start_is_refused(made, tiny_folder, sentiment):
    run, before = made, files_of(made)
    file = str(sentiment / "validation.jsonl")
    tree = settings(tiny_folder, sentiment, run, chain=SHORT | {"steps": [20]})
    tree |= {"start_data": {"validation": file}}
    with pytest.raises(RunError, match=r"keeps none.*eval .*made --matrix --start-rows"):
        train(tree)
    for rows, got in (
        ({}, "must name rows"),
        ({"validation": 0.5}, "must name rows"),
        ({"test": "a", "validation": 0.5}, "`start_data.validation`"),
        ({"train": "a", "validation": "b", "fields": {"no": "x"}}, "`start_data.fields`"),
    ):
        with pytest.raises(ConfigError, match=got):
            train(tree | {"start_data": rows})
    assert files_of(run) == before


def test_a_run_is_known_by_the_rows_for_its_base(tiny_folder, sentiment, tmp_path, chainlora):
    run, rows = tmp_path / "kept", general(sentiment, "validation")
    tree = settings(tiny_folder, sentiment, run, chain=SHORT) | {"start_data": rows}
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
    chainlora("train", moved).refused("needs its new path")


# --- rows that the model writes ---


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> Path:
    """A model folder whose context holds all prompts and what is written after them."""
    folder = tmp_path_factory.mktemp("hub") / "roomy"
    return make_tiny_folder(folder, max_position_embeddings=256)


OPENING = "It was raining when"


def written(address: str, text: str) -> tuple[int, ...]:
    """Return the tokens of a text and of what the model of a run writes after it."""
    model, tokenizer = load_run(address)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=64, do_sample=False)
    return tuple(said[0].tolist())


def of_rows(folder: Path, sentiment: Path, output: Path, **keys) -> dict:
    """Return a config of one stage that says nothing of rows for its start."""
    tree = settings(folder, sentiment, output, chain=SHORT) | keys
    return {key: value for key, value in tree.items() if key != "start_data" or key in keys}


def test_a_run_keeps_what_its_base_writes(roomy, tokenizer, sentiment, tmp_path, caplog, cache):
    """Questions as a chat has them, whose answers alone are learned, and openings of plain text.
    Another run takes them from the cache."""
    tree = of_rows(roomy, sentiment, tmp_path / "run")
    with pytest.raises(Stop):
        train(tree, listener=stopping(1))  # the rows are kept before the first step
    train(tree, resume=True)
    run, told = (
        open_run(tmp_path / "run"),
        "texts after 80 prompts, which are kept as rows of `base`",
    )
    for output, verb in (("again", "wrote"), ("damaged", "writes")):
        caplog.clear()
        train(tree | {"output": str(tmp_path / output)})
        assert f"the base {verb} {told}" in caplog.text
        assert run.keepers == open_run(tmp_path / output).keepers
        (file,) = (cache / "general").iterdir()
        flip_last_bit(file)
    kept = run.kept()["start"]
    assert (len(kept.train), len(kept.validation), kept.loss) == (64, 16, "completion")
    asked = "<s>user\nWhat do bees do in winter?</s>\n<s>assistant\n"
    rows = {row.sequences[0]: row.scored[0] for row in kept.validation[:]}
    said = written(f"{tmp_path}/run@base", asked)
    num_asked = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    assert rows[said] == ((num_asked, len(said)),)
    said = written(f"{tmp_path}/run@base", OPENING)
    assert rows[said] == ((1, len(said)),)
    found = stage_matrix(run, compute=False)  # was scored when the stage had ended
    assert (found.stages, found.states) == (["base", "main"], ["base", "main"])
    assert {cell.stage for cell in found.cells} == {"base"}  # main has scored its own rows
    assert found.as_dict()["states"]["base"][0]["metric"] == "loss"


@pytest.mark.parametrize("event", ["kept", "built"])  # of the general rows: during and after
def test_a_run_without_a_stage_begins_anew(event, roomy, sentiment, tmp_path, cache):
    """After a kill, with other keys too."""
    tree = of_rows(roomy, sentiment, tmp_path / "run")
    end = live(lambda: train_stages(make_stages(tree), listener=at(event, die)))
    assert end.status == -9, end.message
    other = Path(shutil.copytree(tmp_path / "run", tmp_path / "other"))
    half = {"start_data": "none", "train": tree["train"] | {"dtype": "bfloat16"}}
    train(tree | half | {"output": str(other)}, resume=True)
    assert open_run(other).base.dtype == "bfloat16"
    assert open_run(other).history.find("start") is None
    train(tree, resume=True)
    assert "start" in open_run(tmp_path / "run").keepers
    assert undo(tmp_path / "run").key == "base"  # the first stage, as any other


def test_a_run_that_is_stopped_while_the_base_writes_is_gone(roomy, sentiment, tmp_path, cache):
    def stop() -> None:
        raise KeyboardInterrupt

    tree = of_rows(roomy, sentiment, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(tree, listener=at("kept", stop))
    assert not (tmp_path / "run").exists()
    train(tree | {"start_data": "none"})
    assert not open_run(tmp_path / "run").keepers.keys() & {"start"}


def test_one_stage_is_combined_with_what_the_run_began_on(roomy, sentiment, tmp_path, chainlora):
    """Its rows hold the base: they score better than after the stage, and more if they count more;
    without them one stage is nothing to combine."""
    keys = {"chain": {"ranks": [4], "steps": [12]}}
    train(of_rows(roomy, sentiment, run := tmp_path / "run", **keys))
    with pytest.raises(RunError, match="a combination needs two parts or more"):
        combine(run, general=False)
    found = chainlora(f"combine {run} --json --verbose")
    assert found.status == 0, found.err
    assert re.search(r"distance to main 0\.\d\d, start 0\.\d\d", found.err)
    states = {name: row[0]["value"] for name, row in found.json["matrix"]["states"].items()}
    assert states["base"] < states["after-main"] < states["main"]
    light = open_run(run).entry
    chainlora(f"combine {run} main start=64 --no-scores")
    heavy = open_run(run).entry
    assert heavy.parents == light.parents == ("main",)
    assert heavy.distances["start"] < light.distances["start"]


def test_without_a_chat_template_all_prompts_are_plain_text(roomy, sentiment, tmp_path):
    folder = shutil.copytree(roomy, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    train(of_rows(folder, sentiment, tmp_path / "run"))
    kept = open_run(tmp_path / "run").kept()["start"]
    assert len(kept.train) == 64
    assert {row.scored[0][0][0] for row in kept.train[:]} == {1}


def test_what_keeps_no_rows_of_the_base(roomy, sentiment, tmp_path, chainlora):
    data = settings("", sentiment)["data"]
    ways = {
        "none": {"start_data": "none"},
        "no-rows": {"data": data | {"keep_rows": False}},
    }
    for name, keys in ways.items():
        train(of_rows(roomy, sentiment, tmp_path / name, **keys))
        assert open_run(tmp_path / name).history.find("start") is None
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(of_rows(roomy, sentiment, tmp_path / "none")))
    assert "nothing left to do" in chainlora("train", config, "--general", "none").out
    assert "nothing left to do" in chainlora("train", config).out
    given = chainlora("train", config, "--general", sentiment / "validation.jsonl")
    given.refused("which keeps none")
    extended = ("extend", tmp_path / "none", sentiment / "train.jsonl", "--general", "none")
    chainlora(*extended).refused("`start_data` is read when a run begins")


def test_rows_of_the_base_are_given_by_a_file(roomy, tmp_path, chainlora):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"it was {n}"} for n in range(10)])
    answers = write_rows(tmp_path / "a.jsonl", [{"prompt": "the", "completion": " cat"}] * 8)
    words = ("train", answers, "--model", roomy, "--chain.steps", "[1]", "--output", "run")
    done = chainlora(*words, "--general", rows)
    assert done.status == 0, done.err
    assert "base (loss, 2 validation rows)" in done.out
    assert len(open_run("run").kept()["start"].train) == 8
    assert "nothing left to do" in chainlora(*words, "--general", rows).out
    chainlora(*words, "--general", "none").refused("got none for run")
    few = write_rows(tmp_path / "few.jsonl", [{"text": "it was"}] * 3)
    words = (*words[:-1], "other", "--general", few)
    chainlora(*words).refused("`start_data.validation` must hold out some prompts")
    other = (*words[:-2], "--start_data.validation", "4", "--general", rows)
    assert "base (" in chainlora(*other).out
    assert len(open_run("other").kept()["start"].validation) == 4
    forked = ("extend", "run", answers, "--name", "b", "--chain.steps", "[1]", "--output", "fork")
    chainlora(*forked, "--general", rows).refused("for a start without such rows")
    assert chainlora(*forked).status == 0
    assert open_run("fork").keepers["start"] == open_run("run").keepers["start"]


def test_rows_that_are_scored_are_not_combined(roomy, sentiment, tmp_path, chainlora):
    """They measure what a combination does to the base. Training rows stay when they change."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"it was {n}"} for n in range(4)])
    train(of_rows(roomy, sentiment, run := tmp_path / "run"))
    before = open_run(run).kept()["start"]
    assert chainlora("eval", run, "--matrix", "--start-rows", rows).status == 0
    after = open_run(run).kept()["start"]
    assert (after.train[:], len(after.validation)) == (before.train[:], 4)
    given = {"start_data": {"validation": str(rows)}}
    train(of_rows(roomy, sentiment, other := tmp_path / "other", **given))
    with pytest.raises(RunError, match="a combination needs two parts or more"):
        combine(other)
    seen = {"start_data": {"train": str(rows), "validation": str(rows)}}
    train(of_rows(roomy, sentiment, same := tmp_path / "same", **seen))
    assert chainlora("eval", same, "--matrix", "--start-rows", rows).status == 0
    assert len(open_run(same).kept()["start"].train) == 0


def test_a_run_whose_general_ability_has_fallen_is_told(roomy, sentiment, tmp_path, caplog):
    tree = of_rows(roomy, sentiment, tmp_path / "run", train={"lr": 0.3, "batch_size": 8})
    train(tree)
    column = [row[0] for row in stage_matrix(tmp_path / "run").grid]
    first, last = (torch.tensor(cell.value).exp().item() for cell in column)
    assert last > 1.1 * first
    said = f"perplexity of base's rows rose from {first:.3g} to {last:.3g}: general"
    assert said in caplog.text
    assert f"chainlora combine {tmp_path}/run combines it with the base" in caplog.text
    caplog.clear()
    train(tree | {"output": str(tmp_path / "mild"), "train": {"lr": 1e-6, "batch_size": 8}})
    assert "general ability" not in caplog.text


def test_a_lineage_is_rebuilt_whatever_the_base_writes(roomy, sentiment, tmp_path, chainlora):
    train(of_rows(roomy, sentiment, tmp_path / "run"))
    export_adapter(tmp_path / "run", tmp_path / "out")
    data = [f"--data.{key}={value}" for key, value in settings("", sentiment)["data"].items()]
    again = ("train", tmp_path / "out/lineage.json", "--model", roomy, "--output", "new", *data)
    done = chainlora(*again)
    assert done.status == 0, done.err
    assert len(open_run("new").kept()["start"].train) == 64
    assert open_run("new").state == open_run(tmp_path / "run").state
