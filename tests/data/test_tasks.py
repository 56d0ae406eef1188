"""Tasks: prompts to the letter, labels, nested rows, and the samples that a run draws."""

from __future__ import annotations

import pytest
from helpers_data import encode_examples
from helpers_tasks import HUB_ROWS, PROMPTS, make_split, write_rows, write_task

from chainlora.data.tasks import load_task, sample_splits, split_source
from chainlora.errors import DataError


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_are_those_of_the_protocol_to_the_letter(name):
    row, prompt, options, right = PROMPTS[name]
    shown = load_task(name).render_all([row])[0]
    assert shown.prompt == prompt
    if isinstance(options, str):
        assert (shown.completion, shown.references) == (options, right)
        assert (shown.candidates, shown.label) == ((), None)
    else:
        assert (shown.candidates, shown.label, shown.completion) == (options, right, options[right])


@pytest.mark.parametrize("name", [name for name in PROMPTS if load_task(name).completion is None])
def test_no_token_of_smollm2_melts_prompt_and_candidate_into_one(name, smollm2_tokenizer):
    task, (row, prompt, *_) = load_task(name), PROMPTS[name]
    (example,) = encode_examples([row], smollm2_tokenizer, task, objective="candidates")
    read = smollm2_tokenizer(prompt)["input_ids"]
    for candidate, ids in zip(task.render_all([row])[0].candidates, example.sequences, strict=True):
        assert list(ids) == smollm2_tokenizer(prompt + candidate)["input_ids"]
        assert list(ids[: len(read)]) == read
        assert task.labels is None or len(ids) == len(read) + 1  # one pass scores all labels


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_hub_rows_and_original_rows_render_the_same(name):
    task = load_task(name)
    assert task.render_all([HUB_ROWS[name]])[0] == task.render_all([PROMPTS[name][0]])[0]


# --- nested rows ---


def test_multirc_passages_flatten_to_one_row_an_answer(tmp_path):
    answers = [{"text": "Tom", "idx": 0, "label": 1}, {"text": "Tim", "idx": 1, "label": 0}]
    questions = [
        {"question": "Who has dogs?", "idx": 0, "answers": answers},
        {"question": "How many?", "idx": 1, "answers": [{"text": "two", "idx": 2, "label": 1}]},
    ]
    passage = {"text": "Tom has two dogs.", "questions": questions}
    write_rows(tmp_path / "train.jsonl", [{"idx": 7, "passage": passage}] * 2)
    task = load_task("multirc")
    rows = list(split_source(task, tmp_path, "train"))
    assert [row.index for row in rows] == list(range(6))
    assert [row["answer"] for row in rows[:3]] == ["Tom", "Tim", "two"]
    assert rows[2]["idx"] == {"paragraph": 7, "question": 1, "answer": 2}
    assert rows[3].origin.endswith("train.jsonl line 2")
    assert task.render_all([rows[0]])[0] == task.render_all([PROMPTS["multirc"][0]])[0]


def test_record_originals_flatten_with_entities_cut_from_the_text(tmp_path):
    text = PROMPTS["record"][0]["passage"]
    spans = [
        {"start": text.index(name), "end": text.index(name) + len(name) - 1}
        for name in ("Rome", "Ann", "Bob")
    ]
    answers = [{"start": 8, "end": 10, "text": "Bob"}, {"start": 0, "end": 2, "text": "Ann"}]
    row = {
        "idx": 1,
        "passage": {"text": text, "entities": spans},
        "qas": [{"query": "Later @placeholder went home.", "answers": answers, "idx": 0}],
    }
    write_rows(tmp_path / "record" / "val.jsonl", [row])
    task = load_task("record")
    (flat,) = split_source(task, tmp_path, "validation")
    assert task.render_all([flat]) == task.render_all([PROMPTS["record"][0]])


def test_a_nested_row_that_does_not_suit_is_named(tmp_path):
    row = {"passage": {"text": "t", "questions": [{"question": "q"}]}}
    write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(DataError, match=r"multirc.*answers.*train.jsonl line 1"):
        list(split_source(load_task("multirc"), tmp_path, "train"))


# --- splits on disk, and samples ---


def test_the_folder_may_be_the_tasks_own_or_the_one_above(tmp_path):
    task = load_task("sst2")
    write_rows(tmp_path / "data" / "sst2" / "dev.jsonl", [{"sentence": "x ", "label": 0}])
    for folder in ("data", "data/sst2"):
        (row,) = split_source(task, tmp_path / folder, "validation")
        assert row == {"sentence": "x ", "label": 0}


def test_missing_rows_say_both_ways_to_get_them(tmp_path):
    rte, custom = load_task("rte"), load_task(write_task(tmp_path))
    for task, folder, said in (
        (rte, tmp_path, "'train' rows .*neither in .*name the folder.*aps/super_glue.*HF_HUB_OFF"),
        (rte, tmp_path / "none", "no such folder"),
        (rte, None, "aps/super_glue .*HF_HUB_OFFLINE.*local folder"),
        (custom, None, "no Hub dataset.*data.dir"),
    ):
        with pytest.raises(DataError, match=said):
            list(split_source(task, folder, "train"))


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
    said = r"must leave rows to train on .*60 rows .*500.*lower num_validation"
    with pytest.raises(DataError, match=said):
        sample_splits(task, tmp_path)


@pytest.mark.parametrize("of", ["train", "validation"])
def test_a_split_that_stands_in_for_train_keeps_its_test_rows_apart_and_fixed(of, tmp_path, caplog):
    make_split(tmp_path / "validation.jsonl", 100)
    rules = {"test": {"of": "validation", "rows": 40}, "without_train": "validation"}
    rules["validation"] = {"of": of, "rows": 20}
    task = load_task(write_task(tmp_path, sampling=rules))
    one = sample_splits(task, tmp_path, 30, 20, 40, data_seed=0)
    two = sample_splits(task, tmp_path, 30, 20, 10, data_seed=1)
    assert "replaces it" in caplog.text
    indices = [{row.index for row in one[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*indices)) == 90
    assert {row.index for row in two["test"]} < indices[2]
    assert one["train"] != two["train"]
    assert not {row.index for row in two["train"] + two["validation"]} & indices[2]
