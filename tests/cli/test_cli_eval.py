"""`chainlora eval`: which rows are scored, of which chain, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from helpers import records_of, settings, stage_dir

from chainlora import train


def test_eval_takes_the_first_rows_in_file_order(chainlora, finished, sentiment, task, tmp_path):
    target = tmp_path / "new" / "predictions.jsonl"
    asked = f"eval {finished} {task} --split train --limit 5 --predictions {target} --json"
    found = chainlora(asked).json
    assert set(found) == {"task", "split", "rows", "metrics"}
    assert (found["task"], found["split"], found["rows"]) == ("sentiment", "train", 5)
    assert set(found["metrics"]) >= {"accuracy", "loss"}
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    rows = [json.loads(line) for line in (sentiment / "train.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["label"] for line in lines] == [row["label"] for row in rows[:5]]
    for line in lines:
        assert set(line) == {"row", "label", "prediction", "scores"}
        assert len(line["scores"]) == 2
        assert all(score < 0 for score in line["scores"])  # log-probabilities
        assert line["prediction"] == line["scores"].index(max(line["scores"]))
    right = sum(line["prediction"] == line["label"] for line in lines)
    assert found["metrics"]["accuracy"] == right / 5


def test_eval_of_the_plain_model_and_of_the_chain_as_it_was(chainlora, finished, tiny_folder, task):
    base = chainlora(f"eval {tiny_folder} {task} --json").json
    assert chainlora(f"eval {finished} {task} --links 0 --json").json == base
    records = records_of(finished)
    knots = [r for r in records if r["event"] == "eval" and r["where"] in ("start", "knot")]
    for links, record in enumerate(knots):
        found = chainlora(f"eval {finished} {task} --links {links} --json").json["metrics"]
        # float32 sums in another order
        assert found["loss"] == pytest.approx(record["loss"], abs=1e-5)
    assert chainlora(f"eval {finished} {task} --dtype bfloat16").status == 0
    text = chainlora(f"eval {finished} {task}")
    assert text.out.startswith("sentiment validation: accuracy 1.0000, loss ")
    assert text.out.endswith("(16 rows)\n")


def test_eval_says_which_rows_are_not_those_of_the_training(
    chainlora, tiny_folder, sentiment, tmp_path, caplog, monkeypatch
):
    rows = shutil.copytree(sentiment, tmp_path / "rows")
    run, keys = tmp_path / "run", {"chain": {"ranks": [2], "steps": [1]}}
    train(settings(tiny_folder, rows, run, **keys))
    before = chainlora(f"eval {run} --json").json
    assert caplog.text == ""
    shutil.copy(rows / "train.jsonl", rows / "validation.jsonl")
    assert chainlora(f"eval {run} --json").json != before
    assert f"data.validation has changed since the run was trained ({rows}/" in caplog.text
    assert "data.task" not in caplog.text
    assert chainlora(f"eval {run} --split train").status == 0
    assert caplog.text.count("has changed") == 1
    assert chainlora(f"export {run} --to merged --output {tmp_path}/merged").status == 0
    task = yaml.safe_load((rows / "task.yaml").read_text())
    (rows / "task.yaml").write_text(json.dumps(task | {"description": "another one"}))
    monkeypatch.chdir(rows)  # an export has the last part of each path
    for place in (run, tmp_path / "merged"):
        caplog.clear()
        assert chainlora(f"eval {place} --data {rows}/train.jsonl").status == 0
        assert caplog.text.count("data.task has changed since the run was trained") == 1


@pytest.mark.parametrize(
    "keys",
    [
        "--chain.ranks [] --chain.steps [] --data.shots 3",
        "--data.max_length 8 --data.truncation left",
    ],
    ids=["in context", "cut"],
)
def test_eval_reads_a_runs_own_task_as_the_run_did(
    chainlora, config, sentiment, task, tmp_path, keys
):
    told = chainlora(f"train {config} {keys} --json").json["metrics"]["validation"]
    # the same rows in the same packs: the same bits
    assert chainlora(f"eval {tmp_path}/run {task} --json").json["metrics"] == told
    text = (sentiment / "task.yaml").read_text().replace("name: sentiment", "name: other")
    (tmp_path / "other.yaml").write_text(text)
    # not the run's task: its rows are read whole and without demonstrations
    other = f"--task {tmp_path}/other.yaml --data {sentiment}"
    loss = chainlora(f"eval {tmp_path}/run {other} --json").json["metrics"]["loss"]
    assert loss != pytest.approx(told["loss"], abs=1e-4)


# --- the rows of the run itself, or a file read as they are ---


ROUNDING = 1e-5  # float32: the same sums in other packs


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with rows of prompt and completion."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"prompt": f"two red birds {n}", "completion": f" fly {n % 3}"} for n in range(24)]
    write_rows(folder / "train.jsonl", rows[:16])
    write_rows(folder / "held_out.jsonl", rows[16:])
    return folder


@pytest.fixture(scope="module")
def written(tiny_folder, sentiment, texts, tmp_path_factory) -> Path:
    """A finished run on files without a task, with its best point kept."""
    run = tmp_path_factory.mktemp("written") / "run"
    files = {"train": str(texts / "train.jsonl"), "validation": str(texts / "held_out.jsonl")}
    tree = settings(tiny_folder, sentiment, run, train={"keep_best": True})
    train(tree | {"data": files | {"num_validation": 6}})
    return run


def validation(run: Path) -> dict[str, float]:
    return json.loads((stage_dir(run) / "result.json").read_text())["metrics"]["validation"]


def test_a_run_scores_what_its_validation_scored(chainlora, written, finished):
    for run, task, rows in ((written, None, 6), (finished, "sentiment", 16)):
        found = chainlora(f"eval {run} --json").json
        assert (found["task"], found["split"], found["rows"]) == (task, "validation", rows)
        assert found["metrics"] == pytest.approx(validation(run), abs=ROUNDING)
    assert chainlora(f"eval {written}").out.startswith("validation: loss ")


def test_other_rows_links_and_limits(chainlora, written, tiny_folder, texts, finished, sentiment):
    file = texts / "train.jsonl"
    found = chainlora(f"eval {written} --data {file} --json").json
    assert (found["task"], found["split"], found["rows"]) == (None, str(file), 16)
    folder = chainlora(f"eval {written} --data {texts} --split train --json").json
    assert found == folder | {"split": str(file)}
    assert chainlora(f"eval {written} --data {file} --limit 3 --json").json["rows"] == 3
    assert chainlora(f"eval {written} --limit 2 --json").json["rows"] == 2
    base = chainlora(f"eval {written} --links 0 --data {file} --json").json
    assert base["metrics"]["loss"] > found["metrics"]["loss"]
    assert chainlora(f"eval {tiny_folder} --data {file} --json").json == base
    found = chainlora(f"eval {finished} --data {sentiment}/train.jsonl --json").json
    shown = (found["task"], found["split"], found["rows"])
    assert shown == ("sentiment", f"{sentiment}/train.jsonl", 32)  # its task, on other rows


def test_rows_that_are_gone_are_asked_for(chainlora, written, texts):
    moved = texts.rename(f"{texts}-moved")
    chainlora(f"eval {written}").refused("check the path", "--matr")
    moved.rename(texts)
