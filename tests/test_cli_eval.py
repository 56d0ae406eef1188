"""`chainlora eval`: which rows are scored, of which chain, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_rows

from chainlora.data.tasks import Task, load_task, sample_splits


def test_eval_takes_the_first_rows_in_file_order(chainlora, finished, sentiment, tmp_path):
    target = tmp_path / "new" / "predictions.jsonl"
    found = chainlora(
        "eval",
        finished,
        "--task",
        sentiment / "task.yaml",
        "--data",
        sentiment,
        "--split",
        "train",
        "--limit",
        "5",
        "--predictions",
        target,
        "--json",
    ).json
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


def test_eval_of_the_plain_model_and_of_the_chain_as_it_was(
    chainlora, finished, tiny_folder, sentiment
):
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    base = chainlora("eval", tiny_folder, *task).json
    assert chainlora("eval", finished, *task, "--links", "0").json == base
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    knots = [r for r in records if r["event"] == "eval" and r["where"] in ("start", "knot")]
    for links, record in enumerate(knots):
        found = chainlora("eval", finished, *task, "--links", links).json["metrics"]
        assert found["loss"] == pytest.approx(
            record["loss"], abs=1e-5
        )  # float32 sums in another order
    assert chainlora("eval", finished, *task, "--dtype", "bfloat16").status == 0
    text = chainlora("eval", finished, *task[:-1])
    assert text.out.startswith("sentiment validation: accuracy 1.0000, loss ")
    assert text.out.endswith("(16 rows)\n")


def test_eval_reads_a_file_of_rows_too(chainlora, finished, sentiment):
    task = ("--task", sentiment / "task.yaml", "--json", "--limit", "3")
    assert (
        chainlora("eval", finished, "--data", sentiment / "validation.jsonl", *task).json
        == chainlora("eval", finished, "--data", sentiment, *task).json
    )


@pytest.mark.parametrize(
    "keys",
    [
        ("--chain.ranks", "[]", "--chain.steps", "[]", "--data.shots", "3"),
        ("--data.max_length", "8", "--data.truncation", "left"),
    ],
    ids=["in context", "cut"],
)
def test_eval_reads_a_runs_own_task_as_the_run_did(chainlora, config, sentiment, tmp_path, keys):
    result = chainlora("train", config, *keys, "--json").json
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    # the same rows in the same packs: the same bits
    assert (
        chainlora("eval", tmp_path / "run", *task).json["metrics"]
        == result["metrics"]["validation"]
    )
    other = (sentiment / "task.yaml").read_text().replace("name: sentiment", "name: other")
    (tmp_path / "other.yaml").write_text(
        other
    )  # not the run's task: read whole and without demonstrations
    task = ("--task", tmp_path / "other.yaml", *task[2:])
    loss = chainlora("eval", tmp_path / "run", *task).json["metrics"]["loss"]
    assert loss != pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)


def stand_in(folder: Path, test_of: str) -> tuple[Task, Path]:
    """A task and its folder without a train split: 30 validation rows stand in, 12 test rows come
    from `test_of`."""
    rules = {
        "without_train": "validation",
        "validation": {"of": "train", "rows": 5},
        "test": {"of": test_of, "rows": 12},
    }
    tree = {
        "name": "word",
        "description": "Made up.",
        "prompt": "{{ text }} it was",
        "labels": [" bad", " good"],
        "metric": "accuracy",
        "loss": "candidates",
        "sampling": rules,
    }
    (folder / "word.yaml").write_text(yaml.safe_dump(tree))
    (folder / "rows").mkdir()
    for split, count in (("validation", 30), ("test", 4)):
        write_rows(
            folder / "rows" / f"{split}.jsonl",
            [{"text": f"cat {i}", "label": i % 2} for i in range(count)],
        )
    return load_task(folder / "word.yaml"), folder / "rows"


def test_eval_of_a_split_that_stands_in_for_train_scores_rows_that_no_run_trains_on(
    chainlora, tiny_folder, tmp_path, caplog
):
    task, rows = stand_in(tmp_path, "validation")
    scored = tmp_path / "predictions.jsonl"
    done = chainlora(
        "eval",
        tiny_folder,
        "--task",
        tmp_path / "word.yaml",
        "--data",
        rows,
        "--predictions",
        scored,
        "--json",
    )
    assert done.json["rows"] == 12
    assert (
        "'validation' stands in for it: only the 12 of its 30 rows that no run trains on are scored"
        in caplog.text
    )
    unseen = [json.loads(line)["row"] for line in scored.read_text().splitlines()]
    assert unseen == sorted(set(unseen))
    for seed in range(4):
        for num_test in (3, 12, 20):
            drawn = sample_splits(task, rows, num_test=num_test, data_seed=seed)
            assert not {row.index for row in drawn["train"] + drawn["validation"]} & set(unseen)
    evaluate = ("eval", tiny_folder, "--task", tmp_path / "word.yaml", "--json", "--data")
    assert (
        chainlora(*evaluate, rows / "validation.jsonl").json["rows"] == 30
    )  # a file is scored whole
    (rows / "validation.jsonl").rename(rows / "val.jsonl")
    for name in ("validation", "val"):  # the same file
        assert chainlora(*evaluate, rows, "--split", name).json["rows"] == 12
    (rows / "val.jsonl").rename(rows / "validation.jsonl")
    shutil.copy(rows / "validation.jsonl", rows / "train.jsonl")  # nothing stands in any more
    assert chainlora(*evaluate, rows).json["rows"] == 30


def test_eval_of_a_split_that_stands_in_for_train_is_refused_where_test_rows_come_from_another(
    chainlora, tiny_folder, tmp_path
):
    _, rows = stand_in(tmp_path, "test")
    evaluate = ("eval", tiny_folder, "--task", tmp_path / "word.yaml", "--json", "--data")
    chainlora(*evaluate, rows).refused(
        "split 'validation' of task 'word' is what runs train on",
        "(got 30 rows)",
        "score --split test, or name the file itself as --data",
    )
    assert chainlora(*evaluate, rows, "--split", "test").json["rows"] == 4
    assert chainlora(*evaluate, rows / "validation.jsonl").json["rows"] == 30


def test_eval_with_the_wrong_task_data_or_split(chainlora, finished, sentiment, tmp_path):
    task = ("--task", sentiment / "task.yaml")
    chainlora("eval", finished, "--task", "sst").refused("(got 'sst'; did you mean 'sst2'?)")
    chainlora("eval", finished, "--task", sentiment / "tsk.yaml").refused(
        "task file must be readable (got "
    )
    chainlora("eval", finished, *task).refused("(got no folder); give data.dir or --data DIR")
    chainlora("eval", finished, *task, "--data", tmp_path / "none").refused("(got no such folder)")
    chainlora("eval", finished, *task, "--data", sentiment, "--split", "tset").refused(
        "needs its 'tset' rows as"
    )
    write_rows(tmp_path / "validation.jsonl", [{"text": "good", "label": "goood"}])
    chainlora("eval", finished, *task, "--data", tmp_path).refused(
        "goood", "validation.jsonl line 1"
    )
