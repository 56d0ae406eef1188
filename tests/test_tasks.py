"""Task files: prompts to the letter, labels, rows, samples, errors. The rows here are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from chainlora.data.encoding import encode_examples
from chainlora.data.tasks import (
    explode_rows,
    list_tasks,
    load_rows,
    load_split,
    load_task,
    majority_rate,
    sample_splits,
)
from chainlora.errors import ConfigError, DataError

# One row a task and, letter for letter, what a model reads: the protocol's table with its fields
# filled in ("/" there is a line break). The third entry is the text of each candidate, or the
# completion.
PROMPTS = {
    "sst2": (
        {"sentence": "a warm and funny film . ", "label": 1},
        "a warm and funny film . It was",
        (" terrible", " great"),
        1,
    ),
    "rte": (
        {"premise": "Rain fell all day.", "hypothesis": "It rained.", "label": "entailment"},
        'Rain fell all day.\nDoes this mean that "It rained." is true? Yes or No?\n',
        ("Yes", "No"),
        0,
    ),
    "cb": (
        {
            "premise": "She doubted that the ship had sailed.",
            "hypothesis": "the ship had sailed",
            "label": "neutral",
        },
        'Suppose She doubted that the ship had sailed. Can we infer that "the ship had sailed"? '
        "Yes, No, or Maybe?\n",
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": (
        {"passage": "Tea -- Tea is a drink.", "question": "is tea a drink", "label": True},
        "Tea -- Tea is a drink. Is tea a drink?",
        (" Yes", " No"),
        0,
    ),
    "wsc": (
        {
            "text": "Ann thanked Eve because She had helped.",
            "label": True,
            "target": {
                "span1_text": "Eve",
                "span2_text": "She",
                "span1_index": 2,
                "span2_index": 4,
            },
        },
        "Ann thanked Eve because She had helped.\n"
        'In the previous sentence, does the pronoun "she" refer to Eve? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "wic": (
        {
            "word": "bank",
            "sentence1": "We sat on the bank.",
            "sentence2": "The bank was shut.",
            "label": False,
        },
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "We sat on the bank.\nThe bank was shut.\n",
        ("No", "Yes"),
        0,
    ),
    "multirc": (
        {
            "paragraph": "Tom has two dogs.",
            "question": "Who has dogs?",
            "answer": "Tom",
            "label": 1,
        },
        "Tom has two dogs.\nQuestion: Who has dogs?\n"
        'I found this answer "Tom". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {
            "premise": "The cup broke.",
            "choice1": "It fell.",
            "choice2": "I washed it.",
            "question": "cause",
            "label": 0,
        },
        "The cup broke because",
        (" it fell.", " I washed it."),
        0,
    ),
    "record": (
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nThey talked\n@highlight\nIt rained",
            "query": "Later @placeholder went home.",
            "entities": ["Rome", "Ann", "Bob"],
            "answers": ["Bob", "Ann"],
        },
        "Ann met Bob in Rome.\n- They talked\n- It rained\n-",
        (" Later Rome went home.", " Later Ann went home.", " Later Bob went home."),
        2,
    ),
    "squad": (
        {
            "title": "Tea",
            "context": "Tea grows in Assam.",
            "question": " Where does tea grow?",
            "answers": {"text": ["Assam", "in Assam"], "answer_start": [13, 10]},
        },
        "Title: Tea\nContext: Tea grows in Assam.\nQuestion: Where does tea grow?\nAnswer:",
        " Assam\n",
        ("Assam", "in Assam"),
    ),
    "drop": (
        {
            "passage": "They won 3 games and lost 2.",
            "question": "How many games were there?",
            "answers_spans": {"spans": ["5"], "types": ["number"]},
        },
        "Passage: They won 3 games and lost 2.\nQuestion: How many games were there?\nAnswer:",
        " 5\n",
        ("5",),
    ),
    "gsm8k": (
        {
            "question": "Two boxes hold 4 pens each. How many pens?",
            "answer": "2*4 = <<2*4=8>>8 pens.\n#### 8",
        },
        "Question: Two boxes hold 4 pens each. How many pens?\nAnswer:",
        " 2*4 = <<2*4=8>>8 pens.\n#### 8",
        ("8",),
    ),
    "dialogsum": (
        {"dialogue": "#Person1#: Hello.\n#Person2#: Good night. ", "summary": "They greet."},
        "Dialogue:\n#Person1#: Hello.\n#Person2#: Good night.\nSummary:",
        " They greet.",
        ("They greet.",),
    ),
}

# What the same task calls its fields and labels on the Hub, where that differs from the original
# files.
HUB_ROWS = {
    "rte": {"premise": "Rain fell all day.", "hypothesis": "It rained.", "label": 0},
    "cb": {
        "premise": "She doubted that the ship had sailed.",
        "hypothesis": "the ship had sailed",
        "label": 2,
    },
    "boolq": {"passage": "Tea -- Tea is a drink.", "question": "is tea a drink", "label": 1},
    "wsc": {
        "text": "Ann thanked Eve because She had helped.",
        "span1_text": "Eve",
        "span2_text": "She",
        "label": 1,
    },
    "wic": {
        "word": "bank",
        "sentence1": "We sat on the bank.",
        "sentence2": "The bank was shut.",
        "label": 0,
    },
}

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
READS, ROWS = "| task | prompt | candidates", "| task | train | validation"  # its two tables


def page_table(header: str) -> dict[str, list[str]]:
    """Task → cells of the page's table that begins so."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]
    ]
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: cells for name, *cells in rows}


def shown(text: str) -> str:
    """A text as the page shows it: line breaks as ⏎, a blank at the beginning as ␣."""
    text = f"␣{text[1:]}" if text.startswith(" ") else text
    return "`" + text.replace("\n", "⏎") + "`"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, **changes) -> Path:
    keys = {
        "name": "colour",
        "description": "Made up.",
        "prompt": "{{ text }} It is",
        "labels": [" red", " blue"],
        "metric": "accuracy",
        "loss": "candidates",
    } | changes
    path = folder / "colour.yaml"
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return path


# --- prompts
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_are_those_of_the_protocol_to_the_letter(name):
    row, prompt, options, right = PROMPTS[name]
    shown = load_task(name).render(row)
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


def test_the_page_shows_what_a_model_reads_of_every_task():
    page = page_table(READS)
    assert sorted(page) == sorted(PROMPTS) == list_tasks()
    for name, (row, *_) in PROMPTS.items():
        task = load_task(name)
        read = task.render(row)
        answers = list(map(shown, read.candidates or (read.completion,)))
        if task.labels is not None:  # each with the first value that means it
            values = [
                next(value for value, of in task.labels.items() if of == word)
                for word in task.label_words
            ]
            answers = [
                f"{word} {str(value).lower()}" for word, value in zip(answers, values, strict=True)
            ]
        assert page[name][:2] == [shown(read.prompt), ", ".join(answers)], name


@pytest.mark.parametrize("name", list(PROMPTS))
def test_the_page_names_the_tokens_that_smollm2_scores(name, smollm2_tokenizer):
    task, (row, prompt, *_) = load_task(name), PROMPTS[name]
    cell = page_table(READS)[name][2]
    if task.completion is not None:
        assert (
            cell
            == {"loss": "free text: held-out loss", "token_f1": "free text: generated to the ⏎"}[
                task.metric
            ]
        )
        assert task.stop == (None if task.metric == "loss" else "\n")
        return
    (example,) = encode_examples([row], smollm2_tokenizer, task, objective="candidates")
    scored = [
        list(ids[begin:end])
        for ids, ((begin, end),) in zip(example.sequences, example.scored, strict=True)
    ]
    # where they begin, by the tokenizer alone: no token melts prompt and candidate into one
    read = smollm2_tokenizer(prompt)["input_ids"]
    for candidate, tokens in zip(task.render(row).candidates, scored, strict=True):
        assert smollm2_tokenizer(prompt + candidate)["input_ids"] == read + tokens
    alone = all(len(tokens) == 1 for tokens in scored)
    assert cell == " · ".join(str(tokens[0] if alone else tokens) for tokens in scored)
    assert alone == (task.labels is not None)  # so one pass scores all labels of a row


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_hub_rows_and_original_rows_render_the_same(name):
    task = load_task(name)
    assert task.render(HUB_ROWS[name]) == task.render(PROMPTS[name][0])


def test_copa_keeps_I_upper_case_and_lowers_only_the_first_word():
    row = {
        "premise": "Paul sang. ",
        "choice1": " The Queen left.",
        "choice2": "I left.",
        "question": "effect",
        "label": 1,
    }
    shown = load_task("copa").render(row)
    assert shown.prompt + shown.candidates[0] == "Paul sang so the Queen left."
    assert shown.prompt + shown.candidates[1] == "Paul sang so I left."


def test_boolq_keeps_a_question_mark_and_the_case_of_names():
    row = {"passage": "P.", "question": "is NATO old?", "label": False}
    assert load_task("boolq").render(row).prompt == "P. Is NATO old?"


def test_record_compares_entities_with_all_right_ones():
    shown = load_task("record").render(PROMPTS["record"][0])
    assert shown.names == ("Rome", "Ann", "Bob")
    assert shown.references == ("Bob", "Ann")


def test_demonstrations_are_solved_rows_before_the_prompt():
    task = load_task("sst2")
    rows = [{"sentence": "good ", "label": 1}, {"sentence": "bad ", "label": 0}]
    assert task.demonstrations(rows) == "good It was great\n\nbad It was terrible\n\n"
    assert task.demonstrations([]) == ""


@pytest.mark.parametrize("value", [True, 1, "1", "true", "True", 1.0, "Yes"])
def test_labels_are_found_however_the_file_writes_them(value):
    task = load_task("wic")
    assert task.label_index(value) == (None if value == "Yes" else 1)


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
    rows = load_split(task, tmp_path, "train")
    assert [row.index for row in rows] == list(range(6))
    assert [row["answer"] for row in rows[:3]] == ["Tom", "Tim", "two"]
    assert rows[2]["idx"] == {"paragraph": 7, "question": 1, "answer": 2}
    assert rows[3].origin.endswith("train.jsonl line 2")
    assert task.render(rows[0]) == task.render(PROMPTS["multirc"][0])


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
    assert task.render(load_split(task, tmp_path, "validation")[0]) == task.render(
        PROMPTS["record"][0]
    )


def test_a_nested_row_that_does_not_suit_is_named(tmp_path):
    write_rows(
        tmp_path / "train.jsonl", [{"passage": {"text": "t", "questions": [{"question": "q"}]}}]
    )
    with pytest.raises(DataError, match=r"multirc.*answers.*train.jsonl line 1"):
        load_split(load_task("multirc"), tmp_path, "train")


# --- rows of files
# ------------------------------------------------------------------------------------------


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "one\u2028line", "label": "0"}, {"text": 'a "b", c\nd', "label": "1"}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        read = load_rows(tmp_path / name)
        assert read == rows, name
        assert [row.index for row in read] == [0, 1]
        assert all(name in row.origin for row in read)
    # The whole file is read as a Hub dataset's folder would be: by split name.
    write_rows(tmp_path / "set" / "test.jsonl", rows)
    assert load_rows(tmp_path / "set", "test") == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"must be JSON .*bad.jsonl line 2 column"),
        ('{"text": "a"}\n\n["b"]\n', r"row must be an object .*list.*bad.jsonl line 3"),
        ('{"text": "a"}\n{}\n', r"row must be an object .*empty object.*line 2"),
        ("\n \n", r"at least one row .*bad.jsonl"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"must be UTF-8 .*bad.jsonl line 2"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.csv", "text,label\na,1\nb\n", r"header's 2 fields .*bad.csv line 3"),
        ("bad.csv", 'text,label\n"a,1\n', r"must be CSV .*bad.csv line"),
        ("bad.json", '[{"a": 1},\n]', r"must be JSON .*bad.json line"),
        ("bad.json", '{"a": 1}', r"list of rows.*dict"),
        ("bad.parquet", "text", r"must be Parquet .*bad.parquet"),
        ("bad.txt", "text", r"must end in .jsonl.*bad.txt"),
    ],
)
def test_other_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


def test_a_missing_file_or_split_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"must be a file, a folder or a Hub dataset .*nothing.jsonl"
    ):
        load_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"'test' as one of test.jsonl.*without"):
        load_rows(tmp_path, "test")


def test_an_unreachable_hub_dataset_names_the_other_way():
    with pytest.raises(
        DataError, match=r"no-such-owner/none .*HF_HUB_OFFLINE is set.*local folder"
    ):
        load_rows("no-such-owner/none:config@main", "train")


# --- splits and samples
# -------------------------------------------------------------------------------------


def make_split(path: Path, num_rows: int) -> None:
    write_rows(path, [{"text": f"t{i}", "label": i % 2} for i in range(num_rows)])


def test_the_folder_may_be_the_tasks_own_or_the_one_above(tmp_path):
    task = load_task("sst2")
    write_rows(tmp_path / "data" / "sst2" / "dev.jsonl", [{"sentence": "x ", "label": 0}])
    for folder in ("data", "data/sst2"):
        assert load_split(task, tmp_path / folder, "validation") == [{"sentence": "x ", "label": 0}]


def test_missing_rows_say_both_ways_to_get_them(tmp_path):
    with pytest.raises(
        DataError,
        match=r"'train' rows .*neither in .*name the folder.*aps/super_glue.*HF_HUB_OFFLINE",
    ):
        load_split(load_task("rte"), tmp_path, "train")
    with pytest.raises(DataError, match=r"no such folder"):
        load_split(load_task("rte"), tmp_path / "none", "train")
    with pytest.raises(DataError, match=r"aps/super_glue .*HF_HUB_OFFLINE.*local folder"):
        load_split(load_task("rte"), None, "train")
    custom = load_task(write_task(tmp_path))
    with pytest.raises(DataError, match=r"no Hub dataset.*data.dir"):
        load_split(custom, None, "train")


def test_samples_are_disjoint_deterministic_and_follow_the_data_seed(tmp_path):
    make_split(tmp_path / "train.jsonl", 60)
    make_split(tmp_path / "validation.jsonl", 30)
    task = load_task(write_task(tmp_path))
    first = sample_splits(task, tmp_path, 20, 10, 15, data_seed=3)
    again = sample_splits(task, tmp_path, 20, 10, 15, data_seed=3)
    other = sample_splits(task, tmp_path, 20, 10, 15, data_seed=4)
    assert {name: len(rows) for name, rows in first.items()} == {
        "train": 20,
        "validation": 10,
        "test": 15,
    }
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
    sizes = {
        name: len(rows) for name, rows in sample_splits(task, tmp_path, 1000, 50, 1000).items()
    }
    assert sizes == {"train": 10, "validation": 50, "test": 30}
    with pytest.raises(
        DataError, match=r"must leave rows to train on .*60 rows .*500.*lower num_validation"
    ):
        sample_splits(task, tmp_path)


def test_a_split_that_stands_in_for_train_keeps_its_test_rows_apart_and_fixed(tmp_path, caplog):
    make_split(tmp_path / "validation.jsonl", 100)
    rules = {"test": {"of": "validation", "rows": 40}, "without_train": "validation"}
    task = load_task(write_task(tmp_path, sampling=rules))
    one = sample_splits(task, tmp_path, 30, 20, 40, data_seed=0)
    two = sample_splits(task, tmp_path, 30, 20, 10, data_seed=1)
    assert "stands in" in caplog.text
    indices = [{row.index for row in one[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*indices)) == 90
    assert {row.index for row in two["test"]} < indices[2]
    assert one["train"] != two["train"]
    assert not {row.index for row in two["train"] + two["validation"]} & indices[2]


def test_an_unknown_sampling_rule_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"protocol or saner \(got 'random'\)"):
        sample_splits(load_task("rte"), tmp_path, sampling="random")


@pytest.mark.parametrize("name", list(PROMPTS))
def test_the_page_counts_the_real_rows_and_their_commonest_label(name, shared_data):
    task = load_task(name)
    for split, cell in zip(("train", "validation", "test"), page_table(ROWS)[name], strict=False):
        if cell in ("Hub", "–"):  # not at hand, or no such rows anywhere
            assert task.hub is not None
            with pytest.raises(DataError, match=f"'{split}' rows"):
                load_split(task, shared_data, split)
            continue
        rows = load_split(task, shared_data, split)
        rate = majority_rate(task, rows)
        assert cell == f"{len(rows):,}" + ("" if rate is None else f" ({100 * rate:.2f})")


@pytest.mark.parametrize("name", list(PROMPTS))
def test_the_page_says_how_many_rows_a_run_draws(name, shared_data):
    task, cell = load_task(name), page_table(ROWS)[name][3]
    if cell == "Hub":
        with pytest.raises(DataError):
            sample_splits(task, shared_data)
        return
    drawn = sample_splits(task, shared_data)
    counts = [" · ".join(str(len(rows)) for rows in drawn.values())]
    if task.sampling.validation.saner is not None:
        saner = sample_splits(task, shared_data, sampling="saner")
        counts.append("saner " + " · ".join(str(len(rows)) for rows in saner.values()))
    assert cell == "; ".join(counts)
    for position, row in enumerate(drawn["train"]):
        task.render(row, position)


def test_what_the_page_says_of_odd_wsc_rows(shared_data):
    task = load_task("wsc")
    rows = [
        row for split in ("train", "validation") for row in load_split(task, shared_data, split)
    ]
    ending = [row for row in rows if row["text"].endswith(" ")]
    broken = [
        row for row in rows if "\n" in row["target"]["span1_text"] + row["target"]["span2_text"]
    ]
    assert (len(ending), len(broken)) == (3, 2)
    assert (
        "Three WSC texts end in a blank, and two rows have a line break in a span; both stay"
        in PAGE
    )
    assert all(row["text"] + "\nIn the previous" in task.render(row).prompt for row in ending)
    assert all(
        f"refer to {row['target']['span1_text']}?" in task.render(row).prompt for row in broken
    )


# --- task files
# ---------------------------------------------------------------------------------------------


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'mutirc'; did you mean 'multirc'\?"):
        load_task("mutirc")
    with pytest.raises(ConfigError, match=r"got .*none.yaml"):
        load_task("none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prmpt": "x"}, r"unknown key `prmpt`; did you mean 'prompt'\?"),
        ({"sampling": {"trian": 3}}, r"unknown key `sampling.trian`; did you mean 'train'\?"),
        ({"metric": None}, r"`metric` must be given"),
        ({"metric": "acuracy"}, r"`metric` must be 'accuracy', .* \(got 'acuracy'\)"),
        ({"labels": ["a"]}, r"at least two different words"),
        ({"labels": ["a", "a"]}, r"(two different words|differ from each other)"),
        ({"labels": None}, r"one of `labels`, `candidates`, `completion` \(got none\)"),
        ({"completion": "x"}, r"got labels and completion"),
        ({"labels": None, "completion": "x"}, r"loss: completion and metric em"),
        (
            {"labels": None, "completion": "x", "loss": "completion", "metric": "em"},
            r"`references` \(got none\)",
        ),
        *(
            (
                {
                    "labels": None,
                    "completion": "x",
                    "loss": "completion",
                    "metric": metric,
                    "references": "gold",
                },
                rf"`metric: {metric}` .*neither `stop` nor `add_eos`\); set add_eos: true, or a "
                rf"`stop`",
            )
            for metric in ("em", "token_f1")
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
    keys = {
        "labels": None,
        "completion": "x",
        "loss": "completion",
        "metric": "em",
        "references": "gold",
    }
    assert load_task(write_task(tmp_path, **keys, **end)).metrics == ("em", "token_f1")


@pytest.mark.parametrize(
    "words", [[" True", " False"], [" 1", " 2"], [" true", " x"], [" a", " b", " 0"]]
)
def test_a_list_of_labels_has_no_word_that_reads_as_another_position(tmp_path, words):
    with pytest.raises(
        ConfigError, match=r"in the order of its positions \(got .*write a mapping from each value"
    ):
        load_task(write_task(tmp_path, labels=words))


@pytest.mark.parametrize("words", [[" False", " True"], [" 0", " 1"], [" 2", " 3"], [" a", " 1"]])
def test_words_that_read_as_their_own_position_or_as_none_are_labels(tmp_path, words):
    task = load_task(write_task(tmp_path, labels=words))
    for position, word in enumerate(words):
        assert task.label_index(position) == task.label_index(word.strip()) == position


def test_a_mapping_says_what_such_words_mean(tmp_path):
    (tmp_path / "t.yaml").write_text(
        'name: t\ndescription: d\nprompt: "{{ text }}"\nlabels: {true: " True", false: " False"}\n'
        "metric: accuracy\nloss: candidates\n"
    )
    task = load_task(tmp_path / "t.yaml")
    assert [
        task.render({"text": "x", "label": value}).completion
        for value in (1, "1", True, 0, "False")
    ] == [
        " True",
        " True",
        " True",
        " False",
        " False",
    ]


def test_bare_yes_and_no_are_caught(tmp_path):
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace('[" red", " blue"]', "[No, Yes]"))
    with pytest.raises(ConfigError, match=r"YAML reads bare Yes and No so.*quotes"):
        load_task(path)


def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nprompt: [")
    with pytest.raises(ConfigError, match=r"must be YAML .*t.yaml line \d"):
        load_task(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, r"`prompt` .*'text' is undefined.*bad.jsonl line 1.*fields are label"),
        ({"text": None, "label": 0}, r"`prompt` .*a null"),
        ({"text": "x"}, r"`label` .*'label' is undefined"),
        ({"text": "x", "label": 2}, r"label must be one .*got 2 .*bad.jsonl line 1.*0 or 'red'"),
        ({"text": "x", "label": None}, r"label must be one .*got None"),
    ],
)
def test_a_row_that_does_not_suit_the_task_is_named(tmp_path, row, message):
    task = load_task(write_task(tmp_path))
    path = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        task.render(load_rows(path)[0])
    assert "\n" not in str(caught.value)


def test_candidates_of_a_row_must_hold_the_right_one(tmp_path):
    task = load_task("record")
    row = PROMPTS["record"][0] | {"answers": ["Zoe"]}
    with pytest.raises(DataError, match=r"label must be a candidate .*Zoe.*row 5"):
        task.render(row, 5)
    with pytest.raises(DataError, match=r"at least two"):
        task.render(PROMPTS["record"][0] | {"entities": ["Bob"]})


def test_a_text_among_the_candidates_of_a_row_is_the_item_and_a_number_the_position(tmp_path):
    task = load_task(write_task(tmp_path, labels=None, candidates="options"))

    def label(value, options):
        return task.render({"text": "x", "options": options, "label": value}).label

    assert [label(value, ["10", "20", "30"]) for value in ("20", "1", 1)] == [
        1,
        1,
        1,
    ]  # no item is called 1
    assert [label(value, ["3", "4", "5"]) for value in ("3", "5", 2)] == [0, 2, 2]
    assert [label(value, ["1", "2", "3", "4"]) for value in (3, 0, "4")] == [
        3,
        0,
        3,
    ]  # no position 4
    assert label("1", ["0", "1"]) == label(1, [7, 1]) == 1  # both meanings are one
    with pytest.raises(
        DataError,
        match=r"must mean one candidate \(got '3' of .* item 2 and the position of another"
        r"\); give the position as a number, e.g. label: \(options\).index\(label\)",
    ):
        label("3", ["1", "2", "3", "4"])
    repaired = load_task(
        write_task(tmp_path, labels=None, candidates="options", label="(options).index(label)")
    )
    assert repaired.render({"text": "x", "options": ["1", "2", "3", "4"], "label": "3"}).label == 2
    with pytest.raises(DataError, match=r"a candidate or its position \(got 20"):
        label(20, ["10", "20", "30"])


def test_templates_run_in_a_sandbox(tmp_path):
    task = load_task(write_task(tmp_path, prompt="{{ text.__class__.__mro__ }}"))
    with pytest.raises(DataError, match="unsafe"):
        task.render({"text": "x", "label": 0})


def test_the_example_task_needs_no_python(tmp_path):
    task = load_task(Path(__file__).parents[1] / "examples" / "custom_task.yaml")
    shown = task.render({"headline": "Rates rise again ", "section": "business"})
    assert (
        shown.prompt + shown.candidates[shown.label]
        == "Headline: Rates rise again\nSection: business"
    )
    assert explode_rows(task, []) == []
