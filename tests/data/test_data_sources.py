"""Rows of files and of the Hub: every format the same, a bad row named, nothing loaded whole."""

from __future__ import annotations

import json
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from helpers_tasks import write_as, write_rows

from chainlora import evaluate_task
from chainlora.data.sources import FileSource, HubSource, find_source
from chainlora.data.tasks import load_task
from chainlora.errors import DataError


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"text": "one\u2028line", "label": "0"}, {"text": 'a "b", c\nd', "label": "1"}]
    for suffix in (".jsonl", ".csv", ".parquet"):
        write_as(tmp_path / f"a{suffix}", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        read = list(find_source(tmp_path / name))
        assert read == rows, name
        assert [row.index for row in read] == [0, 1]
        assert all(name in row.origin for row in read)
    # The whole file is read as a Hub dataset's folder would be: by split name.
    write_rows(tmp_path / "set" / "test.jsonl", rows)
    assert list(find_source(tmp_path / "set", "test")) == rows


FIRST = b'{"text": "a"}\n'
# Files that cannot be read, and what is said of them.
UNREADABLE = [
    ("bad.jsonl", FIRST + b'{"text": \n', r"must be JSON .*bad.jsonl line 2 column"),
    ("torn.jsonl", FIRST + b'{"text": "a\n', r"got Invalid control character at \S+torn.jsonl"),
    ("bad.jsonl", FIRST + b'\n["b"]\n', r"row must be an object .*list.*bad.jsonl line 3"),
    ("bad.jsonl", FIRST + b'{"text": "a", "to": [{"b": 1, "b": 1}]}\n',
     r"keys of a JSON object must differ \(got 'b' twice at .*bad.jsonl line 2\)"),
    ("bad.json", b'[{"a": 1}, {"a": 1, "b": 2, "a": 3}]', r"got 'a' twice at .*bad.json\)"),
    ("bad.jsonl", FIRST + b"{}\n", r"row must be an object .*empty object.*line 2"),
    ("bad.jsonl", b"\n \n", r"at least one row .*bad.jsonl"),
    ("bad.jsonl", b'[\n {"a": 1}\n]\n', r"line 1 column .*; if the file is one JSON value, name"),
    ("bad.jsonl", FIRST + b'{"text": "\xff"}\n', r"must be UTF-8 .*bad.jsonl line 2"),
    ("bad.jsonl", b'{"text": "caf\xe9"}\n',
     r"probably Latin-1 or Windows-1252, .*caf\xe9.* line 1\); convert it: iconv -f WINDOWS"),
    ("bad.json", '[{"text": "a"}]'.encode("utf-16"), r"got UTF-16 at .*iconv -f UTF-16 -t UTF-8"),
    ("bad.csv", b"text,label\nok,1\nb\x81,1\n",
     r"UTF-16 or Windows-1252 \(got the byte 0x81 at .*bad.csv after line "),
    ("bad.csv", b"\xef\xbb\xbftext,label\na\xff,1\n", r"got the byte 0xff"),
    ("bad.csv", b"text;label\r\n;\r\n;;\r\na;1;2\r\n", r"2 fields \(got 3 at .*bad.csv line 4"),
    ("bad.jsonl", rb'{"a": "a\ud83d b"}', r"Unicode .got half a character, '\\ud83d', .* line 1"),
    ("bad.jsonl", FIRST + rb'{"a\uDE00": "b"}', r"valid Unicode .*line 2"),
    ("bad.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"can parse \(got Exceeds the limit.*line 1"),
    ("bad.jsonl", b"[" * 200_000 + b"]" * 200_000, r"Python can parse \(got .*line 1"),
    ("bad.csv", b'text,label\n"a\n",1\n\n"b\nb"\n', r"2 fields \(got 1 at .*bad.csv line 5"),
    ("bad.csv", b'text,label\na,1\n"a,1\na,1\n', r"must be CSV .*bad.csv line 3"),
    ("bad.csv", b"text,label,text\na,1,b\n", r"different names \(got 'text' twice in .*bad.csv"),
    ("bad.csv", b"text\n" + b"a" * 200_000, r"field larger .*bad.csv line .*JSON lines"),
    ("bad.json", b'[{"a": 1},\n]', r"must be JSON .*bad.json line"),
    ("bad.json", b'{"a": 1}', r"list of rows.*dict"),
    ("bad.json", b'{"a": 1}\n{"a": 2}\n',
     r"bad.json line 2 .*; if each line is a row, name the file .jsonl"),
    ("bad.parquet", b"text", r"must be Parquet .*bad.parquet"),
    ("bad.txt", b"text", r"must end in .jsonl.*bad.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(find_source(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


ROWS = [{"prompt": "Köln, „Dom“", "answer": '"1"; 2'}, {"prompt": "a\nb", "answer": "3"}]
PLAIN = 'prompt,answer\n"Köln, „Dom“","""1""; 2"\n"a\nb",3\n'
EXCEL = ' prompt;answer \r\n;\r\nKöln, „Dom“;"""1""; 2"\r\n;\r\n;\r\n"a\nb";3\r\n'
SPELLED = [  # how a file says these rows, and what is told of it
    (PLAIN.encode(), ""),
    (PLAIN.encode("utf-8-sig"), ""),
    (PLAIN.replace("\n", "\n\n", 1).encode(), ""),
    (
        EXCEL.encode("cp1252"),
        "as Windows-1252 ('…Köln…'), separated by semicolons, without the blanks around "
        "' prompt', 'answer ', without 3 empty rows",
    ),
    (
        EXCEL.replace("; 2", ", 2").replace(";", "\t").replace(", 2", "; 2").encode("utf-16"),
        "as UTF-16, separated by tabs, without the blanks around ' prompt', 'answer ', without 3 "
        "empty rows",
    ),
    (
        '"prompt";"answer"\r\n"Köln, „Dom“";"""1""; 2"\r\n"a\nb";"3"'.encode(),
        "separated by semicolons",
    ),
    (PLAIN.replace("\n", "\n,\n", 1).encode(), "without 1 empty row"),
]


@pytest.mark.parametrize(("content", "told"), SPELLED)
def test_a_csv_file_of_another_program_is_read_and_says_how(tmp_path, content, told):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    source = find_source(path)
    assert list(source) == ROWS
    assert source.num_rows() == 2
    remark = re.sub(r"\('.*Köln.*?'\)", "('…Köln…')", source.remark())
    assert remark == (told and f"{path}: read {told}")


def test_a_folder_with_one_split_in_two_files_is_refused(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"in one file \(got train.jsonl, train.csv in "):
        find_source(tmp_path)


def test_a_hub_dataset_is_read_by_folder_and_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, word in (("colour", "film"), ("other", "plot")):
        target = tmp_path / "hub" / folder / "train" / "0000.parquet"
        target.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": word, "label": 1}]), target)
    rows = list(HubSource(str(tmp_path / "hub"), "train", folder="colour"))
    assert rows == [{"text": "film", "label": 1}]
    assert rows[0].origin.endswith("train row 0")


# --- streams ---


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reading_takes_the_memory_of_a_few_rows(tmp_path, suffix):
    rows = [{"text": f"{i} " + "word " * 400} for i in range(4000)]  # 8 MB
    source = FileSource(write_as(tmp_path / f"a{suffix}", rows))
    next(iter(source))  # imports
    tracemalloc.start()
    assert sum(1 for _ in source) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6  # 256 rows at a time are 0.5 MB, twice or thrice over


def test_eval_with_a_limit_reads_no_more_than_its_rows(tiny_folder, sentiment, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((sentiment / "validation.jsonl").read_text() + "broken\n")
    task = load_task(sentiment / "task.yaml")
    found = evaluate_task(str(tiny_folder), task, data=str(path), limit=4)
    assert found["rows"] == 4
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "validation.jsonl")
    again = evaluate_task(str(tiny_folder), task, data=str(tmp_path / "folder"), limit=4)
    assert found["split"] == str(path)
    assert again == {**found, "split": "validation"}


def test_values_of_parquet_that_are_nothing_here_are_named(tmp_path):
    path, far = tmp_path / "rows.parquet", pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": far}), path)
    with pytest.raises(DataError, match=r"rows.parquet: date value out of range"):
        list(find_source(path))
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"'text' twice in .*rows.parquet"):
        list(find_source(path))


def test_what_a_table_fills_in_is_no_value(tmp_path):
    """A column of Parquet has one type, so that each call has the arguments of all."""
    rows = [
        {
            "messages": [
                {"role": "assistant", "content": None, "calls": [{"arguments": {name: 1}}]}
            ],
            "meta": {name: 1},
        }
        for name in ("city", "day")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = find_source(tmp_path / "a.parquet")
    assert [first["messages"], second["messages"]] == [row["messages"] for row in rows]
    assert first["meta"] == {"city": 1, "day": None}  # of a task, which may ask for it
