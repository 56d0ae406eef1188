"""Tasks: prompts to the letter, labels, nested rows."""

from __future__ import annotations

import pytest
from helpers_data import encode_examples
from helpers_tasks import HUB_ROWS, PROMPTS, write_rows

from chainlora.data.tasks import Task, load_task, split_source
from chainlora.errors import DataError


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_are_those_of_the_protocol_to_the_letter(name):
    row, prompt, options, right = PROMPTS[name]
    shown = load_task(name).render_all([row])[0]
    assert shown.prompt == prompt
    if isinstance(options, str):
        assert (shown.completion, shown.references, shown.candidates, shown.label) == (
            options,
            right,
            (),
            None,
        )
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


@pytest.mark.parametrize("value", [True, 1, "1", "true", "True", 1.0, "Yes"])
def test_labels_are_found_however_the_file_writes_them(value):
    task = load_task("wic")
    assert task.label_index(value) == (None if value == "Yes" else 1)


@pytest.mark.parametrize(("value", "place"), [(" sport", 1), ("sport", 1), ("  sport", None)])
def test_a_label_may_be_written_as_the_task_declares_it(value, place):
    keys = {"prompt": "p", "labels": [" business", " sport"], "metric": "accuracy"}
    task = Task(name="t", description="d", loss="candidates", **keys)
    assert task.label_index(value) == place


# --- nested rows
# --------------------------------------------------------------------------------------------


def test_multirc_passages_flatten_to_one_row_an_answer(tmp_path):
    passage = {
        "text": "Tom has two dogs.",
        "questions": [
            {
                "question": "Who has dogs?",
                "idx": 0,
                "answers": [
                    {"text": "Tom", "idx": 0, "label": 1},
                    {"text": "Tim", "idx": 1, "label": 0},
                ],
            },
            {"question": "How many?", "idx": 1, "answers": [{"text": "two", "idx": 2, "label": 1}]},
        ],
    }
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
    assert (
        task.render_all([next(iter(split_source(task, tmp_path, "validation")))])[0]
        == task.render_all([PROMPTS["record"][0]])[0]
    )


def test_a_nested_row_that_does_not_suit_is_named(tmp_path):
    write_rows(
        tmp_path / "train.jsonl", [{"passage": {"text": "t", "questions": [{"question": "q"}]}}]
    )
    with pytest.raises(DataError, match=r"multirc.*answers.*train.jsonl line 1"):
        list(split_source(load_task("multirc"), tmp_path, "train"))
