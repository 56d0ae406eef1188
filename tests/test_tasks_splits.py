"""Splits of a task on disk, the samples a run draws, and what docs/tasks.md says of them."""

from __future__ import annotations

import pytest
from helpers_tasks import make_split, write_rows, write_task

from chainlora.data.tasks import load_task, sample_splits, split_source
from chainlora.errors import DataError


def test_the_folder_may_be_the_tasks_own_or_the_one_above(tmp_path):
    task = load_task("sst2")
    write_rows(tmp_path / "data" / "sst2" / "dev.jsonl", [{"sentence": "x ", "label": 0}])
    for folder in ("data", "data/sst2"):
        assert list(split_source(task, tmp_path / folder, "validation")) == [
            {"sentence": "x ", "label": 0}
        ]


def test_missing_rows_say_both_ways_to_get_them(tmp_path):
    with pytest.raises(
        DataError,
        match=r"'train' rows .*neither in .*name the folder.*aps/super_glue.*HF_HUB_OFFLINE",
    ):
        list(split_source(load_task("rte"), tmp_path, "train"))
    with pytest.raises(DataError, match=r"no such folder"):
        list(split_source(load_task("rte"), tmp_path / "none", "train"))
    with pytest.raises(DataError, match=r"aps/super_glue .*HF_HUB_OFFLINE.*local folder"):
        list(split_source(load_task("rte"), None, "train"))
    custom = load_task(write_task(tmp_path))
    with pytest.raises(DataError, match=r"no Hub dataset.*data.dir"):
        list(split_source(custom, None, "train"))


def test_samples_are_disjoint_deterministic_and_follow_the_data_seed(tmp_path):
    make_split(tmp_path / "train.jsonl", 60)
    make_split(tmp_path / "validation.jsonl", 30)
    task = load_task(write_task(tmp_path))
    first = sample_splits(task, tmp_path, 20, 10, 15, data_seed=3)
    again = sample_splits(task, tmp_path, 20, 10, 15, data_seed=3)
    other = sample_splits(task, tmp_path, 20, 10, 15, data_seed=4)
    assert [*map(len, first.values())] == [20, 10, 15]
    assert first == again
    assert first != other
    assert not {row.index for row in first["train"]} & {row.index for row in first["validation"]}
    for name in ("validation", "test"):
        indices = [row.index for row in first[name]]
        assert indices == sorted(indices)
    fewer = sample_splits(task, tmp_path, 5, 10, 15, data_seed=3)
    assert fewer["train"] == first["train"][:5]
    assert (fewer["validation"], fewer["test"]) == (first["validation"], first["test"])


def test_a_short_train_split_gives_validation_its_rows_first(tmp_path):
    make_split(tmp_path / "train.jsonl", 60)
    make_split(tmp_path / "validation.jsonl", 30)
    task = load_task(write_task(tmp_path))
    assert [*map(len, sample_splits(task, tmp_path, 1000, 50, 1000).values())] == [10, 50, 30]
    with pytest.raises(
        DataError, match=r"must leave rows to train on .*60 rows .*500.*lower num_validation"
    ):
        sample_splits(task, tmp_path)


@pytest.mark.parametrize("of", ["train", "validation"])
def test_a_split_that_stands_in_for_train_keeps_its_test_rows_apart_and_fixed(of, tmp_path, caplog):
    make_split(tmp_path / "validation.jsonl", 100)
    rules = {"test": {"of": "validation", "rows": 40}, "without_train": "validation"}
    rules["validation"] = {"of": of, "rows": 20}
    task = load_task(write_task(tmp_path, sampling=rules))
    one = sample_splits(task, tmp_path, 30, 20, 40, data_seed=0)
    two = sample_splits(task, tmp_path, 30, 20, 10, data_seed=1)
    assert "stands in" in caplog.text
    indices = [{row.index for row in one[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*indices)) == 90
    assert {row.index for row in two["test"]} < indices[2]
    assert one["train"] != two["train"]
    assert not {row.index for row in two["train"] + two["validation"]} & indices[2]


DRAWN = {
    "sst2": (1000, 500, 872),
    "rte": (1000, 500, 277),
    "cb": (150, 100, 56),
    "boolq": (1000, 500, 1000),
    "wsc": (54, 500, 104),
    "wic": (1000, 500, 638),
    "multirc": (1000, 500, 1000),
    "copa": (300, 100, 100),
    "gsm8k": (1000, 500, 1000),
    "dialogsum": (400, 100, 500),
}


@pytest.mark.parametrize("name", DRAWN)
def test_rows_of_the_real_data_that_a_run_draws_are_rendered(name, shared_data):
    task = load_task(name)
    drawn = sample_splits(task, shared_data)
    assert tuple(map(len, drawn.values())) == DRAWN[name]
    assert len(task.render_all(drawn["train"])) == DRAWN[name][0]
    if name == "wsc":
        saner = sample_splits(task, shared_data, sampling="saner")
        assert tuple(map(len, saner.values())) == (450, 104, 104)
