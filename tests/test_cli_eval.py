"""`chainlora eval`: which rows are scored, of which chain, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_rows
from helpers import records_of
from helpers_tasks import make_split, write_task

from chainlora.data.tasks import load_task, sample_splits


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


@pytest.fixture
def stand_in(tiny_folder, tmp_path):
    """Make a task without a train split: 30 validation rows stand in, 12 test rows come from
    a split that is named. Return the command that scores it, without the rows."""

    def make(test_of: str) -> str:
        rules = {
            "without_train": "validation",
            "validation": {"of": "train", "rows": 5},
            "test": {"of": test_of, "rows": 12},
        }
        task = write_task(tmp_path, sampling=rules)
        for split, count in (("validation", 30), ("test", 4)):
            make_split(tmp_path / "rows" / f"{split}.jsonl", count)
        return f"eval {tiny_folder} --task {task} --json --data"

    return make


def test_eval_of_a_split_that_stands_in_for_train_scores_rows_that_no_run_trains_on(
    chainlora, stand_in, tmp_path, caplog
):
    evaluate, rows = stand_in("validation"), tmp_path / "rows"
    scored = tmp_path / "predictions.jsonl"
    assert chainlora(f"{evaluate} {rows} --predictions {scored}").json["rows"] == 12
    assert "only the 12 of its 30 rows that no run trains on are scored" in caplog.text
    unseen = [json.loads(line)["row"] for line in scored.read_text().splitlines()]
    assert unseen == sorted(set(unseen))
    task = load_task(tmp_path / "colour.yaml")
    for seed in range(4):
        for num_test in (3, 12, 20):
            drawn = sample_splits(task, rows, num_test=num_test, data_seed=seed)
            assert not {row.index for row in drawn["train"] + drawn["validation"]} & set(unseen)
    # a file is scored whole
    assert chainlora(f"{evaluate} {rows}/validation.jsonl").json["rows"] == 30
    (rows / "validation.jsonl").rename(rows / "val.jsonl")
    for name in ("validation", "val"):  # the same file
        assert chainlora(f"{evaluate} {rows} --split {name}").json["rows"] == 12
    shutil.copy(rows / "val.jsonl", rows / "train.jsonl")  # nothing stands in any more
    assert chainlora(f"{evaluate} {rows}").json["rows"] == 30


def test_eval_of_a_split_that_stands_in_for_train_is_refused_where_test_rows_come_from_another(
    chainlora, stand_in, tmp_path
):
    evaluate, rows = stand_in("test"), tmp_path / "rows"
    chainlora(f"{evaluate} {rows}").refused(
        "split 'validation' of task 'colour' is what runs train on",
        "(got 30 rows)",
        "score --split test, or name the file itself as --data",
    )
    assert chainlora(f"{evaluate} {rows} --split test").json["rows"] == 4
    assert chainlora(f"{evaluate} {rows}/validation.jsonl").json["rows"] == 30


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("--task sst", ["(got 'sst'; did you mean 'sst2'?)"]),
        ("--task {rows}/tsk.yaml", ["task file must be readable (got "]),
        ("--task {rows}/task.yaml", ["(got no folder); give data.dir or --data DIR"]),
        ("--task {rows}/task.yaml --data {rows}/none", ["(got no such folder)"]),
        ("--task {rows}/task.yaml --data {rows} --split tset", ["needs its 'tset' rows as"]),
        ("--task {rows}/task.yaml --data {wrong}", ["goood", "validation.jsonl line 1"]),
    ],
)
def test_eval_with_the_wrong_task_data_or_split(
    chainlora, finished, sentiment, tmp_path, asked, parts
):
    write_rows(tmp_path / "validation.jsonl", [{"text": "good", "label": "goood"}])
    words = asked.format(rows=sentiment, wrong=Path(tmp_path))
    chainlora(f"eval {finished} {words}").refused(*parts)
