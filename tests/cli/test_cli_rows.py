"""`chainlora rows`: rows by their values, and files without them, in every format."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_rows


def shop(count: int = 20) -> list[dict]:
    """Rows of a shop; those at 2 and 16 are of customer 42."""
    return [
        {"question": f"q{k}", "answer": f"a{k}", "customer": 42 if k in (2, 16) else k}
        for k in range(count)
    ]


def write_jsonl(path: Path) -> bytes:
    lines = [json.dumps(row, separators=(",", ": ")) for row in shop()]
    lines[5] += "  \r"  # bytes that a writer would not write again
    path.write_bytes(codecs.BOM_UTF8 + "\n".join(lines).encode())
    return b"".join(path.read_bytes().splitlines(keepends=True)[k] for k in range(20)
                    if k not in (2, 16))  # fmt: skip


def test_rows_are_counted_and_named(chainlora):
    write_rows(Path("january.jsonl"), shop())
    found = chainlora("rows january.jsonl --where customer=42")
    assert found.out == "2 of 20 rows of january.jsonl have customer=42: lines 3 and 17\n"
    both = chainlora("rows january.jsonl --where customer=42 --where question=q2")
    assert both.out == "1 of 20 rows of january.jsonl has customer=42 and question=q2: line 3\n"
    none = chainlora("rows january.jsonl --where customer=x")
    assert (none.status, none.out) == (0, "No row of january.jsonl has customer=x (20 rows)\n")
    expected = {"file": "january.jsonl", "where": ["customer=42"], "total": 20, "found": 2}
    expected |= {"lines": [3, 17], "output": None, "removed": None}
    assert chainlora("rows january.jsonl --where customer=42 --json").json == expected
    write_rows(Path("many.jsonl"), [{"a": True, "b": None, "c": [1]}] * 30)
    many = chainlora("rows many.jsonl --where a=true --where b=null --where c=[1]")
    assert many.out.endswith("lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, "
                             "19, 20 and 10 more\n")  # fmt: skip


def test_other_lines_of_jsonl_keep_their_bytes(chainlora):
    kept = write_jsonl(Path("a.jsonl"))
    before = Path("a.jsonl").read_bytes()
    words = "rows a.jsonl --where customer=42 --output b.jsonl --removed gone.jsonl"
    assert chainlora(words).out.splitlines()[1:] == ["b.jsonl: 18 rows", "gone.jsonl: 2 rows"]
    assert Path("b.jsonl").read_bytes() == kept
    assert Path("a.jsonl").read_bytes() == before
    gone = [json.loads(line) for line in Path("gone.jsonl").read_text().splitlines()]
    assert gone == [shop()[2], shop()[16]]
    chainlora("rows a.jsonl --where customer=none --output c.jsonl")  # asked for: written
    assert Path("c.jsonl").read_bytes() == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_other_rows_of_csv_keep_their_bytes(encoding, end, chainlora):
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    head, gone = f"question;customer{end}", f'"two{end}lines";42{end}'
    rest = [f"'caf\u00e9'; 7{end}", f'"a ""b""";"8"{end}', f"{end}", f";{end}", f"c;9{end}"]
    text = head + rest[0] + gone + "".join(rest[1:]) + "last;42"
    Path("a.csv").write_bytes(mark + text.encode(encoding))
    found = chainlora("rows a.csv --where customer=42 --output b.csv")
    assert found.out.splitlines()[0] == "2 of 5 rows of a.csv have customer=42: lines 3 and 9"
    assert Path("b.csv").read_bytes() == mark + (head + "".join(rest)).encode(encoding)


@pytest.mark.parametrize("wrapped", [False, True])
def test_json_stays_a_list_or_an_object_with_one(wrapped, chainlora):
    tree = {"schema": {"x": 1}, "data": shop()} if wrapped else shop()
    Path("a.json").write_text(json.dumps(tree))
    found = chainlora("rows a.json --where customer=42 --output b.json --json").json
    assert found["rows"] == [2, 16]
    rest = [row for row in shop() if row["customer"] != 42]
    assert json.loads(Path("b.json").read_text()) == (tree | {"data": rest} if wrapped else rest)


def test_parquet_keeps_its_schema(chainlora):
    rows = [row | {"customer": None if row["customer"] == 9 else row["customer"]} for row in shop()]
    fields = [("question", pyarrow.string()), ("answer", pyarrow.large_string())]
    schema = pyarrow.schema([*fields, ("customer", pyarrow.float32())], metadata={"made": "by me"})
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, "a.parquet")
    found = chainlora("rows a.parquet --where customer=42 --output b.parquet")
    assert found.out.splitlines()[0].endswith("have customer=42: rows 2 and 16")
    smaller = pyarrow.parquet.read_table("b.parquet")
    assert smaller.schema.equals(schema, check_metadata=True)
    assert smaller.to_pylist() == [row for row in rows if row["customer"] != 42]


def test_no_file_is_overwritten_and_columns_must_exist(chainlora):
    write_rows(Path("a.jsonl"), shop())
    Path("mine.jsonl").write_text("mine")
    for option in ("--output", "--removed"):
        for path in ("a.jsonl", "mine.jsonl"):
            refused = chainlora(f"rows a.jsonl --where customer=42 {option} {path}")
            refused.refused(f"Cannot write {path}: it exists. Name another file.")
    assert Path("mine.jsonl").read_text() == "mine"
    wrong = chainlora("rows a.jsonl --where customer=42 --output b.csv --removed c.jsonl")
    wrong.refused("Cannot write b.csv: its rows are .jsonl. Name a file .jsonl.")
    unknown = chainlora("rows a.jsonl --where custmer=42 --output b.jsonl")
    unknown.refused("'custmer', which no row of a.jsonl has", "question, answer, customer")
    assert sorted(path.name for path in Path().glob("*")) == ["a.jsonl", "mine.jsonl"]
    chainlora("rows a.jsonl --where customer").misused("write --where COLUMN=VALUE")
    same = "rows a.jsonl --where customer=42 --output b.jsonl --removed b.jsonl"
    chainlora(same).misused("must be different files")
    chainlora("rows no.csv --where a=b").refused("data file must be readable")
