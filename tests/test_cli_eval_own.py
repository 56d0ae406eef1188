"""`chainlora eval RUN` without a task: the rows of the run itself, or a file read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from helpers import settings, stage_dir

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
    from chainlora.cli.main import run as command

    folder = tmp_path_factory.mktemp("written")
    tree = settings(tiny_folder, sentiment, folder / "run", train={"keep_best": True})
    tree["data"] = {
        "train": str(texts / "train.jsonl"),
        "validation": str(texts / "held_out.jsonl"),
        "num_validation": 6,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert command(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def validation(run: Path) -> dict[str, float]:
    return json.loads((stage_dir(run) / "result.json").read_text())["metrics"]["validation"]


def test_a_run_scores_what_its_validation_scored(chainlora, written, finished):
    for run, task, rows in ((written, None, 6), (finished, "sentiment", 16)):
        found = chainlora(f"eval {run} --json").json
        assert (found["task"], found["split"], found["rows"]) == (task, "validation", rows)
        assert found["metrics"] == pytest.approx(validation(run), abs=ROUNDING)
    assert chainlora(f"eval {written}").out.startswith("validation: loss ")


def test_a_task_whose_rows_are_drawn_is_drawn_as_in_the_run(chainlora, config, sentiment, tmp_path):
    drawn = f"--data.train null --data.validation null --data.dir {sentiment} --data.shots 2"
    counts = "--data.num_train 20 --data.num_validation 7 --data.num_test 5"
    result = chainlora(f"train {config} {drawn} {counts} --json").json
    found = chainlora(f"eval {tmp_path}/run --split train --json").json
    assert found["rows"] == 18  # without the two that are demonstrations
    assert "accuracy" in found["metrics"]
    for split, rows in (("validation", 7), ("test", 5)):
        found = chainlora(f"eval {tmp_path}/run --split {split} --json").json
        assert found["rows"] == rows
        assert found["metrics"] == pytest.approx(result["metrics"][split], abs=ROUNDING)


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


def test_a_limit_counts_no_rows_that_are_shown(chainlora, config, tmp_path):
    chain = "--chain.ranks 2 --chain.steps 1"
    assert chainlora(f"train {config} --data.shots 4 {chain}").status == 0
    for limit, rows in ((2, 2), (6, 6), (99, 28)):
        scored = f"eval {tmp_path}/run --split train --limit {limit} --json"
        assert chainlora(scored).json["rows"] == rows


def test_rows_that_are_not_there(chainlora, written, tiny_folder, texts):
    chainlora(f"eval {written} --split test").refused(
        "(got no data.test in the config of ",
        "name another split, or a file as data, or take --matrix",
    )
    chainlora(f"eval {written} --split tset").refused("must be one of train, validation, test")
    chainlora(f"eval no/model --data {texts}/none.jsonl").refused("none.jsonl")  # looked for first
    moved = texts.rename(f"{texts}-moved")
    chainlora(f"eval {written}").refused("check the path, or score those that the run kept: --matr")
    moved.rename(texts)
    outcome = chainlora(f"eval {tiny_folder}")
    assert outcome.status == 2
    assert "Missing option '--task' or '--data': only a run has its own rows" in outcome.err
