"""Task files: what they may say, how a wrong one is refused, and that templates end."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_tasks import write_task

from chainlora.data.sources import Row
from chainlora.data.tasks import load_task
from chainlora.errors import ConfigError, DataError

WRITTEN = {"labels": None, "completion": "x", "loss": "completion"}
WRITTEN |= {"metric": "em", "references": "gold"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prmpt": "x"}, r"unknown key `prmpt`; did you mean 'prompt'\?"),
        ({"metric": None}, r"`metric` must be given"),
        ({"metric": "acuracy"}, r"`metric` must be 'accuracy', .* \(got 'acuracy'\)"),
        ({"labels": ["a"]}, r"at least two different words"),
        ({"labels": ["a", "a"]}, r"(two different words|differ from each other)"),
        ({"labels": {"1": " a", "2": " b", "true": " c"}}, r"'1', which means ' a' and ' c'"),
        ({"labels": None}, r"one of `labels`, `candidates`, `completion` \(got none\)"),
        ({"completion": "x"}, r"got labels and completion"),
        ({"labels": None, "completion": "x"}, r"loss: completion, and metric em"),
        (WRITTEN | {"references": None}, r"`references` \(got none\)"),
        *(
            (
                WRITTEN | {"metric": metric, "stop": stop},
                rf"`metric: {metric}` .*neither `stop` nor `add_eos`.; set add_eos: true, or a `st",
            )
            for metric, stop in (("em", None), ("token_f1", None), ("em", ""))
        ),
        ({"prompt": "{{ text"}, r"`prompt` must be a Jinja2 template"),
        ({"label": "a b"}, r"`label` must be a Jinja2 expression"),
        *(({"labels": words}, r"must mean one of `labels` \(got .*; write a mapping from each valu")
          for words in ([" True", " False"], [" 1", " 2"], [" true", " x"], [" a", " b", " 0"],
                        [" yes", "yes"])),
        ({"labels": [False, True]}, r"YAML reads from an unquoted Yes or No.*quotes"),
    ],
)  # fmt: skip
def test_a_wrong_task_file_says_what_and_where(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(write_task(tmp_path, **changes))
    assert "colour.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [{"stop": "\n"}, {"add_eos": True}], ids=str)
def test_written_answers_are_compared_where_something_ends_them(tmp_path, end):
    assert load_task(write_task(tmp_path, **WRITTEN, **end)).metrics == ("em", "token_f1")


@pytest.mark.parametrize(
    "words", [[" False", " True"], [" 0", " 1"], [" 2", " 3"], [" a", " None"], [" c", " sport"]]
)
def test_words_that_read_as_their_own_position_or_as_none_are_labels(tmp_path, words):
    task = load_task(write_task(tmp_path, labels=words))
    for position, word in enumerate(words):
        written = [position, word, word.strip(), f" {word}"]
        assert [*map(task.label_index, written)] == [position] * 3 + [None]
    assert task.label_index(None) is None


ANY = 10**4000, -(10**300), 1e308, float("inf"), float("nan"), [1] * 9
OPTIONS = {"text": "x", "options": ["1", "2", "3", "4"]}
CHOICE = {"labels": None, "candidates": "options"}


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        *(({}, row, message) for row, message in (
            ({"label": 0}, r"`prompt` .*'text' is undefined.* a.jsonl line 1, .*fields are label"),
            ({"text": None, "label": 0}, r"`prompt` .*a null"),
            ({"text": ["x"], "label": 0}, r"`prompt` .*got \['x'\], which is not a text at .*row"),
            ({"text": b"x", "label": 0}, r"`prompt` .*bytes that are not text"),  # Parquet has such
            ({"text": "x"}, r"`label` .*'label' is undefined"),
            ({"text": "x", "label": 2}, r"label must be one .*got 2 at a.jsonl line 1.*0 or 're"),
            ({"text": "x", "label": None}, r"label must be one .*got None"),
            *(({"text": "x", "label": n}, "that task 'colour' declares .*line 1") for n in ANY),
        )),
        (CHOICE, OPTIONS | {"label": ["Zoe"]}, r"label must be a candidate .*Zoe.*line 1"),
        (CHOICE, OPTIONS | {"label": 20}, r"a candidate or its position \(got 20"),
        (CHOICE, OPTIONS | {"label": "3"}, r"must mean one candidate \(got '3' of .* item 2 or posi"
         r"tion 3\); give the position as a number, e.g. label: \(options\).index\(label\)"),
        (CHOICE, {"text": "x", "options": ["Bob"], "label": 0}, "at least two"),
        ({"prompt": "{{ text.__class__.__mro__ }}"}, {"text": "x", "label": 0}, "unsafe"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_suit_the_task_is_named(tmp_path, changes, row, message):
    task, rows = load_task(write_task(tmp_path, **changes)), [Row(row, 0, "a.jsonl line 1")]
    with pytest.raises(DataError, match=message) as caught:
        task.render_all(rows)
    assert "\n" not in str(caught.value)


def test_true_and_false_are_no_positions_in_a_list_of_labels(tmp_path):
    """They would be 1 and 0: of yes and no, the wrong ones. A mapping says what they mean."""
    row = {"text": "x", "label": True}
    for label in (True, "false"):
        with pytest.raises(DataError, match=r"label must be one .*declared: 0 or 'yes', 1 or 'no'"):
            load_task(write_task(tmp_path, labels=[" yes", " no"])).render_all(
                [row | {"label": label}]
            )
    mapped = load_task(write_task(tmp_path, labels={True: " yes", False: " no"}))
    named = load_task(write_task(tmp_path, labels=[" maybe", " true"]))
    assert [task.render_all([row])[0].label for task in (mapped, named)] == [0, 1]


def test_bytes_are_no_matter_where_no_template_reads_them(tmp_path):
    row = {"text": "x", "label": 0, "image": b"x"}
    assert load_task(write_task(tmp_path)).render_all([row])[0].prompt == "x It is"


def test_a_text_among_the_candidates_of_a_row_is_the_item_and_a_number_the_position(tmp_path):
    task = load_task(write_task(tmp_path, labels=None, candidates="options"))

    def label(value, options, task=task):
        return task.render_all([{"text": "x", "options": options, "label": value}])[0].label

    for options, values, expected in (
        (["10", "20", "30"], ("20", "1", 1), [1, 1, 1]),  # no item is called 1
        (["3", "4", "5"], ("3", "5", 2), [0, 2, 2]),
        (["1", "2", "3", "4"], (3, 0, "4"), [3, 0, 3]),  # no position 4
        (["0", "1"], ("1",), [1]),  # both meanings are one
        ([7, 1], (1,), [1]),
        (["a", "b", "c"], (["d", "c", "b"],), [2]),  # the first that is a candidate
    ):
        assert [label(value, options) for value in values] == expected
    keys = {"labels": None, "candidates": "options", "label": "(options).index(label)"}
    assert label("3", ["1", "2", "3", "4"], load_task(write_task(tmp_path, **keys))) == 2


def test_a_template_that_draws_gives_a_row_the_same_text_always_and_in_threads(tmp_path):
    task = load_task(write_task(tmp_path, prompt="{{ text }}{{ range(99999)|random }}"))
    rows = [{"text": "", "id": each, "label": 0} for each in range(40)]
    before = random.getstate()
    alone = task.render_all(rows)
    assert alone[1].prompt != alone[2].prompt
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns inside a row
    try:
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(task.render_all, [rows] * 12)) == [alone] * 12
    finally:
        sys.setswitchinterval(interval)
    assert random.getstate() == before  # of the user's program
