"""Columns of small files that need no key, and rows whose prompt and answer are joined."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_rows
from helpers_data import CHAT, make_tokenizer, pairs

from chainlora.config.schema import DataConfig
from chainlora.data.splits import check_files, prepare_splits
from chainlora.errors import DataError

KEY = "(change with --data.fields '{{prompt: {}, completion: {}}}'"


def read(path: Path, template: str | None = None, **keys):
    data = DataConfig(train=str(path), **keys)
    check_files(data, None)
    return prepare_splits(data, make_tokenizer("bos", template), 256)


def table(columns: str, row: str) -> Path:
    Path("shop.csv").write_text("\n".join([columns, *[row] * 4]), encoding="utf-8")
    return Path("shop.csv")


def same(found, wanted) -> bool:
    return (found.digest, [*found.train]) == (wanted.digest, [*wanted.train])


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize(
    ("columns", "names", "more"),
    [
        ("customer,question,answer", ("question", "answer"), ", customer is ignored"),
        ("a,input,target,b", ("input", "target"), ", a, b are ignored"),
        ("text,label", ("text", "label"), ""),
    ],
)
def test_usual_columns_are_question_and_answer_and_are_told(columns, names, more, template, caplog):
    """As a chat, if the tokenizer has a template; else a line break is between them."""
    texts = dict.fromkeys(columns.split(","), "7") | dict(zip(names, ("dogs?", "two"), strict=True))
    found = read(table(columns, ",".join(texts.values())), template)
    key = KEY.format(*names) + (" or --data.format text)" if names[0] == "text" else ")")
    form = "a chat" if template else "two lines"
    told = f"{names[0]} and {names[1]} are read as {form}{more} {key}"
    assert caplog.messages == [f"shop.csv: {told}"]
    assert found.report()["train"]["columns"] == told
    caplog.clear()
    fields = dict(zip(("question", "answer"), names, strict=True))
    assert same(read(Path("shop.csv"), template, fields=fields), found)
    assert "read as" not in caplog.text
    asked, said = {"role": "user", "content": "dogs?"}, {"role": "assistant", "content": "two"}
    row = {"messages": [asked, said]} if template else {"prompt": "dogs?\n", "completion": "two"}
    assert same(read(write_rows(Path("a.jsonl"), [row] * 4), template), found)


@pytest.mark.parametrize("template", [None, CHAT])
def test_instructions_are_told_and_read_as_before(template, caplog):
    rows = [{"instruction": "count", "input": "dogs", "output": "two", "customer": 1}] * 4
    found = read(write_rows(Path("a.jsonl"), rows), template)
    form = "a chat" if template else "Alpaca's text"
    told = f"instruction with input below it and output are read as {form}"
    key = KEY.format("instruction", "output") + ")"
    assert caplog.messages == [f"a.jsonl: {told}, customer is ignored {key}"]
    assert same(read(Path("a.jsonl"), template, format="alpaca"), found)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"text": "dogs", "label": 1}, {}),  # a class
        ({"text": "dogs", "question": "a", "answer": "b"}, {}),
        ({"prompt": "dogs ", "completion": "two", "question": "a", "answer": "b"}, {}),
        ({"text": "dogs", "label": "pet"}, {"format": "text"}),
        ({"body": "dogs", "label": "pet"}, {"fields": {"text": "body"}}),
    ],
)
def test_rows_of_a_format_and_explicit_keys_are_read_as_before(row, keys, caplog):
    plain = {"prompt": "dogs ", "completion": "two"} if "prompt" in row else {"text": "dogs"}
    found = read(write_rows(Path("a.jsonl"), [row] * 4), **keys)
    assert found.report()["train"]["unread"]
    assert "read as" not in caplog.text
    assert same(found, read(write_rows(Path("b.jsonl"), [plain] * 4)))


def test_a_large_file_and_held_out_rows_tell_it_once(monkeypatch, caplog, cache):
    rows = [{"question": f"how many {k}? ", "answer": "two", "customer": k} for k in range(2100)]
    path = write_rows(Path("a.jsonl"), rows)
    for _ in range(2):  # the second time out of the cache
        caplog.clear()
        found = read(path, validation=0.1)
        assert len(caplog.messages) == 1, caplog.messages
        assert ", customer is ignored (" in caplog.messages[0]
    assert len(found.train) + len(found.validation) == 2100


def test_pairs_have_no_usual_columns():
    rows = [row | {"question": "a", "answer": "b"} for row in pairs(4)]
    data = DataConfig(train=str(write_rows(Path("a.jsonl"), rows)))
    found = prepare_splits(data, make_tokenizer("bos"), 256, loss="dpo")
    assert found.report()["train"]["unread"] == ["answer", "question"]


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        ([{"q": "a", "a": "b"}], {}),
        ([{"question": "a"}], {"fields": {"prompt": "question", "completion": "reply"}}),
    ],
)
def test_unknown_columns_are_refused_with_the_syntax_of_the_key(rows, keys):
    with pytest.raises(DataError, match=r"--data\.fields '\{question: COLUMN, answer: COLUMN"):
        read(write_rows(Path("a.jsonl"), rows), **keys)
    with pytest.raises(DataError, match=r"--data\.fields '\{prompt: COLUMN\}'"):
        read(write_rows(Path("a.jsonl"), rows), format="completion")


@pytest.mark.parametrize(
    ("prompt", "answer", "count"),
    [
        ("dogs?", "two", 4),
        ("dogs?", " two", 0),
        ("dogs?\n", "two", 0),
        ("<|user|>dogs?<|assistant|>", "two", 0),
        ("[INST] dogs? [/INST]", "two", 0),
        ("", "two", 0),
    ],
)
def test_rows_without_a_separator_are_counted(prompt, answer, count, caplog):
    rows = [{"prompt": prompt, "completion": answer}] * 4
    found = read(write_rows(Path("a.jsonl"), rows))
    said = f"train: nothing separates prompt and answer in {count} of 4 rows. Begin answers with "
    said += "a space, end prompts with a line break, or write a task file with a template"
    assert caplog.messages == [said] * bool(count)
    assert found.report()["train"].get("rows_joined", 0) == count
