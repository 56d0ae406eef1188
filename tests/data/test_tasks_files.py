"""Task files: what they may say, how a wrong one is refused, and that templates end."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_tasks import PROMPTS, write_rows, write_task

from chainlora.data.sources import find_source
from chainlora.data.tasks import load_task
from chainlora.errors import ConfigError, DataError


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'mutirc'; did you mean 'multirc'\?"):
        load_task("mutirc")
    with pytest.raises(ConfigError, match=r"got .*none.yaml"):
        load_task("none.yaml")


WRITTEN = {"labels": None, "completion": "x", "loss": "completion"}
WRITTEN |= {"metric": "em", "references": "gold"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prmpt": "x"}, r"unknown key `prmpt`; did you mean 'prompt'\?"),
        ({"sampling": {"trian": 3}}, r"unknown key `sampling.trian`; did you mean 'train'\?"),
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
    ],
)
def test_a_wrong_task_file_says_what_and_where(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(write_task(tmp_path, **changes))
    assert "colour.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [{"stop": "\n"}, {"add_eos": True}], ids=str)
def test_written_answers_are_compared_where_something_ends_them(tmp_path, end):
    assert load_task(write_task(tmp_path, **WRITTEN, **end)).metrics == ("em", "token_f1")


@pytest.mark.parametrize(
    "words",
    [[" True", " False"], [" 1", " 2"], [" true", " x"], [" a", " b", " 0"], [" yes", "yes"]],
)
def test_a_list_of_labels_has_no_word_that_reads_as_another_position(tmp_path, words):
    said = r"must mean one of `labels` \(got .*; write a mapping from each value"
    with pytest.raises(ConfigError, match=said):
        load_task(write_task(tmp_path, labels=words))


@pytest.mark.parametrize(
    "words", [[" False", " True"], [" 0", " 1"], [" 2", " 3"], [" a", " None"]]
)
def test_words_that_read_as_their_own_position_or_as_none_are_labels(tmp_path, words):
    task = load_task(write_task(tmp_path, labels=words))
    for position, word in enumerate(words):
        assert task.label_index(position) == task.label_index(word.strip()) == position
    assert task.label_index(None) is None


def test_bare_yes_and_no_are_caught(tmp_path):
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace('[" red", " blue"]', "[No, Yes]"))
    with pytest.raises(ConfigError, match=r"YAML reads from an unquoted Yes or No.*quotes"):
        load_task(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, r"`prompt` .*'text' is undefined.*bad.jsonl line 1.*fields are label"),
        ({"text": None, "label": 0}, r"`prompt` .*a null"),
        ({"text": ["x"], "label": 0}, r"`prompt` .*got \['x'\], which is not a text at .*row"),
        ({"text": "x"}, r"`label` .*'label' is undefined"),
        ({"text": "x", "label": 2}, r"label must be one .*got 2 .*bad.jsonl line 1.*0 or 'red'"),
        ({"text": "x", "label": None}, r"label must be one .*got None"),
    ],
)
def test_a_row_that_does_not_suit_the_task_is_named(tmp_path, row, message):
    task = load_task(write_task(tmp_path))
    path = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        task.render_all([next(iter(find_source(path)))])
    assert "\n" not in str(caught.value)


def test_bytes_are_no_text_to_a_template_and_no_matter_where_none_reads_them(tmp_path):
    """Columns of Parquet may be binary; of b'x' a template would write that."""
    task = load_task(write_task(tmp_path))
    with pytest.raises(DataError, match=r"`prompt` .*bytes that are not text"):
        task.render_all([{"text": b"x", "label": 0}])
    assert task.render_all([{"text": "x", "label": 0, "image": b"x"}])[0].prompt == "x It is"


def test_candidates_of_a_row_must_hold_the_right_one(tmp_path):
    task = load_task("record")
    row = PROMPTS["record"][0] | {"answers": ["Zoe"]}
    with pytest.raises(DataError, match=r"label must be a candidate .*Zoe.*row 0"):
        task.render_all([row])
    with pytest.raises(DataError, match=r"at least two"):
        task.render_all([PROMPTS["record"][0] | {"entities": ["Bob"]}])


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
    ):
        assert [label(value, options) for value in values] == expected
    with pytest.raises(
        DataError,
        match=r"must mean one candidate \(got '3' of .* item 2 or position 3"
        r"\); give the position as a number, e.g. label: \(options\).index\(label\)",
    ):
        label("3", ["1", "2", "3", "4"])
    keys = {"labels": None, "candidates": "options", "label": "(options).index(label)"}
    assert label("3", ["1", "2", "3", "4"], load_task(write_task(tmp_path, **keys))) == 2
    with pytest.raises(DataError, match=r"a candidate or its position \(got 20"):
        label(20, ["10", "20", "30"])


def test_templates_run_in_a_sandbox(tmp_path):
    task = load_task(write_task(tmp_path, prompt="{{ text.__class__.__mro__ }}"))
    with pytest.raises(DataError, match="unsafe"):
        task.render_all([{"text": "x", "label": 0}])


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


@pytest.mark.parametrize(
    "value", [10**4000, -(10**300), 1e308, float("inf"), float("nan"), [1] * 9]
)
def test_numbers_of_any_size_are_labels_that_the_task_does_not_declare(tmp_path, value):
    task = load_task(write_task(tmp_path))
    with pytest.raises(DataError, match=r"must be one that task 'colour' declares .*row 0"):
        task.render_all([{"text": "film", "label": value}])
