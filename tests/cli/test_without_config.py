"""`chainlora train ROWS --model M` and `chainlora extend RUN ROWS`: what nobody says, by rule."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from helpers import Stop, history_of, stage_dir, stopping

from chainlora import extend, train
from chainlora.config.staging import name_of_rows
from chainlora.runs.addresses import open_run
from chainlora.runs.history_file import read_history
from chainlora.training.events import Planned


def rows(path: str | Path, count: int = 12, word: str = "good") -> Path:
    pairs = [{"prompt": f"row {k}", "completion": f" {word} {k % 3}"} for k in range(count)]
    return write_rows(Path(path), pairs)


@pytest.fixture(autouse=True)
def short_rows_of_the_base(monkeypatch) -> None:
    """Nothing here is about what the base writes (test_start_rows.py)."""
    monkeypatch.setattr("chainlora.evaluation.start_rows.NEW_TOKENS", 2)


@pytest.fixture
def january(tiny_folder, chainlora) -> Path:
    """A run of one stage, without a config."""
    done = chainlora("train", rows("january.jsonl"), "--model", tiny_folder)
    assert done.status == 0, done.err
    return Path("runs/january")


def chain_of(run: Path, stage: str) -> dict:
    return yaml.safe_load((stage_dir(run, stage) / "config.yaml").read_text())["chain"]


def test_two_files_become_a_run_of_two_stages(tiny_folder, chainlora, caplog):
    table = "\n".join(["prompt,completion", *(f"row {k}, good {k % 3}" for k in range(12))])
    Path("January 2026.csv").write_text(table, encoding="utf-8")
    begin = ("train", "January 2026.csv", "--model", tiny_folder)
    chosen = (
        "rank 8 on all linear layers, 80 epochs, rate 0.001, no validation rows (change with --"
    )
    planned = chainlora(*begin, "--dry-run")
    assert planned.out == "January-2026: would train links of rank 8 on January 2026.csv\n"
    assert caplog.text.count(f"January-2026: {chosen}") == 1
    assert not Path("runs").exists()
    done, run = chainlora(*begin), Path("runs/January-2026")
    assert "one LoRA of rank 8" in done.err
    assert caplog.text.count(f"January-2026: {chosen}") == 2
    assert chain_of(run, "January-2026")["epochs"] == [80]
    assert chain_of(run, "January-2026")["ranks"] == [8]
    on = ("extend", run, rows("february.jsonl", 320), "--chain.target_modules", "q_proj")
    length = "february: rank 8 on q_proj, 4 epochs, rate 0.001"
    for words in ([*on, "--dry-run"], on):
        caplog.clear()
        done = chainlora(*words)
        assert done.status == 0, done.err
        assert length in caplog.text
        assert "does not inherit" not in caplog.text
    assert chain_of(run, "february")["epochs"] == [4]
    assert chainlora("extend", run, rows("march.jsonl", 200), "--dry-run").status == 0
    assert "march: rank 8 on all linear layers, 10 epochs" in caplog.text
    assert open_run(run).stages == ["January-2026", "february"]
    before = history_of(run)
    caplog.clear()
    rows("february.jsonl", 700)  # a file that has been read may grow
    for again in (begin, on):
        found = chainlora(*again)
        assert found.out == f"nothing left to do: {run} has ended\n", found.err
    assert history_of(run) == before
    assert "epoch" not in caplog.text


@pytest.mark.parametrize(
    ("count", "keys", "length"),
    [
        (12, "", "rank 8 on all linear layers, 80 epochs,"),  # of two steps
        (100, "", "13 epochs,"),
        (1300, "", "1 epoch,"),
        (1300, "--data.num_train 300", "5 epochs,"),
        (100, "--chain.ranks [4,2]", "ranks 4, 2 on all linear layers, 13 epochs,"),
        (100, "--train.lr 3e-4", "rate 0.0003"),
        (100, "--chain.steps [3,3]", ""),
        (100, "--chain.ranks [4] --chain.epochs 2", ""),
    ],
)
def test_the_length_is_by_the_rows_unless_it_is_given(
    count, keys, length, tiny_folder, chainlora, caplog
):
    found = chainlora(f"train {rows('a.jsonl', count)} --model {tiny_folder} {keys} --dry-run")
    assert found.status == 0, found.err
    assert length in caplog.text
    assert ("change with" in caplog.text) == bool(length)


def test_weights_count_as_rows(tiny_folder, chainlora, caplog):
    files = [{"path": str(rows("a.jsonl", 100)), "weight": 2}, str(rows("b.jsonl", 1000))]
    files[1] = {"path": files[1], "weight": 0.12}
    config = {"model": str(tiny_folder), "data": {"train": files}, "output": "run"}
    Path("c.json").write_text(json.dumps(config))  # a config all the same
    assert chainlora("train c.json --dry-run").status == 0
    assert "main: rank 8 on all linear layers, 4 epochs" in caplog.text


def test_a_first_stage_that_was_killed_goes_on(january, tiny_folder, chainlora):
    stage = {"name": "january", "data": {"train": "january.jsonl"}}
    tree = {"model": str(tiny_folder), "stages": [stage], "train": {"save_every": 2}}
    with pytest.raises(Stop):
        train(tree | {"output": "killed"}, listener=stopping(4))
    keys = ("--model", tiny_folder, "--train.save_every", "2", "--output", "killed")
    assert chainlora("train", "january.jsonl", *keys).status == 0
    assert chain_of(Path("killed"), "january")["epochs"] == [80]
    assert open_run("killed").state == open_run(january).state


def test_a_stage_that_was_killed_keeps_its_length(january, chainlora):
    whole, file = shutil.copytree(january, "whole"), rows("february.jsonl", 320)
    stage = {"data": {"train": str(file)}, "train": {"save_every": 2}}
    with pytest.raises(Stop):
        extend(january, stage, listener=stopping(4))
    grown = file.read_text()
    rows(file, 1280)  # for which the rule gives one epoch
    again = ("extend", january, file, "--train.save_every", "2")
    refused = chainlora(*again)
    assert refused.status == 1
    assert "a run resumes with the rows it began with" in refused.err
    file.write_text(grown)
    assert "february: goes on from step 4" in chainlora(*again, "--dry-run").out
    assert chainlora(*again).status == 0
    assert chain_of(january, "february")["epochs"] == [4]
    extend(whole, file)
    assert open_run(whole).state == open_run(january).state


def test_a_taken_name_is_refused_with_the_key_that_gives_another(january, tiny_folder, chainlora):
    other = rows("other/january.jsonl", word="bad")
    for command in (f"extend {january} {other}", f"train {other} --model {tiny_folder}"):
        chainlora(command).refused("'january': data.train is other/january.jsonl", "(--name)")
    assert "bad: would train" in chainlora(f"extend {january} {other} --name bad --dry-run").out
    planned = chainlora(f"train {other} --model {tiny_folder} --name bad --dry-run")
    assert "to runs/bad" in planned.err
    into = f"train {rows('february.jsonl')} --model {tiny_folder} --output {january}"
    chainlora(into).refused("chainlora extend runs/january")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("January 2026 (final).csv", "January-2026-final"),
        ("data/2026-01.jsonl", "rows-2026-01"),
        ("données.v2.parquet", "donnees-v2"),
        ("examples/dates/train.jsonl", "dates"),
        ("now.jsonl", "rows-now"),
        ("日本.jsonl", "rows"),
        ("owner/name:config", "name-config"),
        ("x" * 80 + ".jsonl", "x" * 64),
    ],
)
def test_a_stage_has_the_name_of_its_rows(path, name):
    assert name_of_rows(path) == name


@pytest.mark.parametrize("start", ["", "the same words before each row of the file, read once, "])
def test_a_stage_of_equal_rows_is_said_to_take_as_long_as_the_one_before(
    tiny_folder, chainlora, start
):
    """Twelve rows are a batch of eight and one of four: two batches of eight were counted. Words
    that all rows begin with, as those of a chat template, were counted once for each row."""
    pairs = [{"prompt": f"{start}row {k}", "completion": f" good {k % 3}"} for k in range(12)]
    chainlora("train", write_rows(Path("january.jsonl"), pairs), "--model", tiny_folder)
    january = Path("runs/january")
    seen, before = [], json.loads((stage_dir(january, "january") / "result.json").read_text())
    stage = {"name": "again", "data": {"train": "january.jsonl"}, "chain": {"epochs": [80]}}
    extend(january, stage, listener=seen.append)
    (plan,) = (event for event in seen if isinstance(event, Planned))
    after = plan.work_after * before["wall_s"] / before["tokens"]  # combining and scoring
    assert after > 0
    assert plan.estimate - after == pytest.approx(before["wall_s"], rel=0.2)


def test_the_combination_before_tells_how_long_the_next_one_will_take(january, chainlora):
    """And what took how long is told at the end."""
    for place in (1, 2):
        file = rows(f"{place}.jsonl", word=f"word{place}")
        done = chainlora("extend", january, file, "--chain.steps", 2, "--train.lr", 1e-6)
        assert re.search(r"2 steps, about 0:\d\d in all at the speed of the stage", done.err)
        told = r"took \d:\d\d: training \d:\d\d, combining \d:\d\d, loading and scoring \d:\d\d\n"
        assert re.search(told, done.err)
    assert all(e.seconds > 0 for e in read_history(january).entries if e.kind == "combine")


def test_from_python_and_as_a_list_of_json(tiny_folder, chainlora):
    data = {"train": str(rows("a.jsonl"))}
    train({"model": str(tiny_folder), "data": data, "output": "run"}, progress=False)
    table = [json.loads(line) for line in rows("b.jsonl", word="bad").read_text().splitlines()]
    Path("b.json").write_text(json.dumps(table, indent=1))
    assert extend("run", "b.json", progress=False)["stage"] == "b"
    assert {*open_run("run").stages} == {"main", "b"}
    assert chain_of(Path("run"), "b")["epochs"] == [80]


def faq(name: str, *columns: str) -> Path:
    """A file of 12 rows with these columns of a question and an answer, and a customer."""
    table = [",".join([*columns, "customer"]), *(f"row {k}: ,good {k % 3},7" for k in range(12))]
    Path(name).write_text("\n".join(table), encoding="utf-8")
    return Path(name)


def test_a_next_file_is_read_by_the_keys_of_the_stage_before(tiny_folder, chainlora, caplog):
    keys = ("--data.fields", "{prompt: frage, completion: antwort}", "--data.format", "completion")
    first = faq("january.csv", "frage", "antwort")
    done = chainlora("train", first, "--model", tiny_folder, *keys, "--general", "none")
    assert done.status == 0, done.err
    run, short = Path("runs/january"), ("--chain.epochs", 1, "--chain.ranks", 2)

    caplog.clear()
    on = ("extend", run, faq("february.csv", "frage", "antwort"), *short)
    assert chainlora(*on).status == 0
    taken = "data.fields '{prompt: frage, completion: antwort}', data.format completion"
    assert f"stage february reads its rows as january: {taken}" in caplog.messages
    assert "does not inherit" not in caplog.text
    data = open_run(f"{run}@february").config().data
    assert (data.fields["prompt"], data.format) == ("frage", "completion")
    Path("february.csv").unlink()  # a finished stage does not need its file
    assert "nothing left to do" in chainlora(*on).out

    caplog.clear()  # other columns: detected
    done = chainlora("extend", run, faq("march.csv", "question", "answer"), *short)
    assert done.status == 0, done.err
    assert "stage march does not inherit data.format, data.fields from january" in caplog.messages
    assert "march.csv: question and answer are read as a chat, customer is" in caplog.text
    data = open_run(f"{run}@march").config().data
    assert (data.fields, data.format) == ({}, "auto")

    caplog.clear()  # given keys are not mixed with those of the stage before
    given = ("--data.fields", "{text: frage}", "--dry-run")
    assert chainlora("extend", run, faq("april.csv", "frage", "antwort"), *given).status == 0
    assert "reads its rows as" not in caplog.text
