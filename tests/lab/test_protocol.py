"""The paper's tasks: prompts to the letter, nested rows, and the samples that a cell draws."""

from __future__ import annotations

import json

import pytest
from helpers_data import encode_examples
from helpers_tasks import HUB_ROWS, PROMPTS, make_split, write_rows, write_task

from chainlora.errors import DataError
from chainlora_lab.protocol import CellData, check_rows, draw, load_task, read_split, with_files


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


@pytest.mark.parametrize("value", [True, 1, "1", "true", "True", 1.0, "Yes"])
def test_labels_are_found_however_the_file_writes_them(value):
    task = load_task("wic")
    assert task.label_index(value) == (None if value == "Yes" else 1)


def test_multirc_passages_flatten_to_one_row_an_answer(tmp_path):
    answers = [{"text": "Tom", "idx": 0, "label": 1}, {"text": "Tim", "idx": 1, "label": 0}]
    questions = [
        {"question": "Who has dogs?", "idx": 0, "answers": answers},
        {"question": "How many?", "idx": 1, "answers": [{"text": "two", "idx": 2, "label": 1}]},
    ]
    passage = {"text": "Tom has two dogs.", "questions": questions}
    write_rows(tmp_path / "multirc" / "train.jsonl", [{"idx": 7, "passage": passage}] * 2)
    rows = read_split(CellData(task="multirc", dir=str(tmp_path)), "train")
    assert [row["answer"] for row in rows] == ["Tom", "Tim", "two"] * 2
    assert rows[2]["idx"] == {"paragraph": 7, "question": 1, "answer": 2}
    task = load_task("multirc")
    assert task.render_all([rows[0]])[0] == task.render_all([PROMPTS["multirc"][0]])[0]


# --- splits on disk, and samples ---


def test_missing_rows_say_both_ways_to_get_them(tmp_path):
    for task, folder, said in (
        ("rte", tmp_path, "'train' rows .*neither in .*name the folder.*fetch aps/super_glue"),
        (str(write_task(tmp_path)), None, r"must have rows \(got no folder\); give data.dir"),
    ):
        with pytest.raises(DataError, match=said):
            check_rows(CellData(task=task, dir=None if folder is None else str(folder)), None)
    with pytest.raises(DataError, match=r"aps/super_glue .*HF_HUB_OFFLINE.*local file or folder"):
        read_split(CellData(task="rte"), "train")


@pytest.mark.parametrize("keys", [{}, {"dir": "a"}, {"task": "rte", "test": "a"}], ids=str)
def test_a_cell_has_files_or_a_task_that_draws(keys):
    with pytest.raises(ValueError, match="a `train` file, or a `task` alone"):
        CellData(**keys)
    with pytest.raises(ValueError, match=r"`data.dir` and `data.train` exclude each other"):
        CellData(dir="a", train="b")


@pytest.fixture
def colour(tmp_path):
    """Make the section of a cell on 60 rows to train on and 30 to test on."""
    make_split(tmp_path / "train.jsonl", 60)
    make_split(tmp_path / "validation.jsonl", 30)
    names = ("num_train", "num_validation", "num_test")
    whole = {"task": str(write_task(tmp_path)), "dir": str(tmp_path)}
    return lambda *sizes, **keys: CellData(**whole, **dict(zip(names, sizes, strict=False)), **keys)


def test_samples_are_disjoint_deterministic_and_follow_the_data_seed(colour):
    first, again, other = (draw(colour(20, 10, 15, data_seed=seed)) for seed in (3, 3, 4))
    assert [*map(len, first.values())] == [20, 10, 15]
    assert first == again
    assert first != other
    places = {name: [int(row["text"][1:]) for row in rows] for name, rows in first.items()}
    assert not {*places["train"]} & {*places["validation"]}
    for name in ("validation", "test"):
        assert places[name] == sorted(places[name])
    fewer = draw(colour(5, 10, 15, data_seed=3))
    assert fewer["train"] == first["train"][:5]
    assert (fewer["validation"], fewer["test"]) == (first["validation"], first["test"])


def test_what_is_drawn_is_written_to_the_files_of_a_run(colour, tmp_path):
    data = colour(20, 10, 15)
    named = with_files(data, tmp_path / "rows")
    for split, rows in draw(data).items():
        lines = (tmp_path / f"rows/{split}.jsonl").read_text().splitlines()
        assert [*map(json.loads, lines)] == rows
        assert getattr(named, split) == str(tmp_path / f"rows/{split}.jsonl")


def test_a_short_train_split_gives_validation_its_rows_first(colour):
    assert [*map(len, draw(colour(1000, 50, 1000)).values())] == [10, 50, 30]
    said = r"must leave rows to train on .*60 rows .*500.*lower num_validation"
    with pytest.raises(DataError, match=said):
        draw(colour())


def test_a_split_that_stands_in_for_train_keeps_its_test_rows_apart_and_fixed(tmp_path):
    rows = [{"passage": f"t{n}", "question": "q", "label": True} for n in range(1100)]
    write_rows(tmp_path / "validation.jsonl", rows)
    keys = {"task": "boolq", "dir": str(tmp_path), "num_train": 30, "num_validation": 20}
    one = draw(CellData(**keys))
    two = draw(CellData(**keys, num_test=10, data_seed=1))
    found = [{row["passage"] for row in one[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*found)) == 1050
    assert {row["passage"] for row in two["test"]} < found[2]
    assert one["train"] != two["train"]
    assert not {row["passage"] for row in two["train"] + two["validation"]} & found[2]


DRAWN = {
    "sst2": (1000, 500, 872),
    "rte": (1000, 500, 277),
    "cb": (150, 100, 56),
    "boolq": (1000, 500, 1000),
    "wsc": (54, 500, 104),
    "wic": (1000, 500, 638),
    "copa": (300, 100, 100),
    "multirc": (1000, 500, 1000),
    "gsm8k": (1000, 500, 1000),
}


@pytest.mark.parametrize("name", DRAWN)
def test_rows_of_the_real_data_that_a_cell_draws_are_rendered(name, shared_data):
    drawn = draw(CellData(task=name, dir=str(shared_data)))
    assert tuple(map(len, drawn.values())) == DRAWN[name]
    assert len(load_task(name).render_all(drawn["train"])) == DRAWN[name][0]
    if name == "wsc":
        saner = draw(CellData(task=name, dir=str(shared_data), sampling="saner"))
        assert tuple(map(len, saner.values())) == (450, 104, 104)
