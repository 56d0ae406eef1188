"""Rows in memory and in a table: the same examples; content decides the cache; faults survived."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.lives import live, start, wait
from helpers import assert_same_links
from helpers_data import CHAT, TALK, make_tokenizer
from helpers_tasks import write_as, write_rows

from chainlora import train
from chainlora.data import preparing
from chainlora.data.encoding import Options
from chainlora.data.preparing import make_rows
from chainlora.data.rows import MemoryRows
from chainlora.data.sources import FileSource, HubSource, ListSource
from chainlora.errors import DataError
from chainlora_lab.protocol import load_task

TEXT = "the film was great and so is a plot of rain dogs cats two three"
WORDS = TEXT.split()


@pytest.fixture
def cache(cache, monkeypatch) -> Path:
    """A cache of its own, and a limit for what stays in memory that three chunks of rows pass."""
    monkeypatch.setattr(preparing, "_CHUNK", 10)
    monkeypatch.setattr(preparing, "IN_MEMORY", 20)
    return cache / "rows"


def stores(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []


def some_rows(kind: str, count: int = 57) -> list[dict]:
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    makers = {
        "completion": lambda: {"prompt": words(30), "completion": " " + words(5)},
        "text": lambda: {"text": words(30), "id": 7},
        "chat": lambda: {"messages": [{"role": "user", "content": words(5)}, *TALK[1:]]},
        "sst2": lambda: {"sentence": words(9) + " ", "label": draw.randrange(2)},
        "gsm8k": lambda: {"question": words(30), "answer": f"{words(4)}\n#### 2"},
        "copa": lambda: {
            "premise": words(9),
            "question": "cause",
            "choice1": "It fell.",
            "choice2": words(2),
            "label": 0,
        },
    }
    return [makers[kind]() for _ in range(count)]


@pytest.mark.parametrize("kind", ["completion", "text", "chat", "sst2", "gsm8k", "copa"])
def test_rows_on_disk_are_the_rows_in_memory(cache, tmp_path, monkeypatch, kind):
    tokenizer = make_tokenizer("bos", CHAT)
    source = FileSource(write_rows(tmp_path / "rows.jsonl", some_rows(kind)))
    task = load_task(kind) if kind in ("sst2", "gsm8k", "copa") else kind
    options = Options(24, "left") if kind != "text" else Options(24)
    stored = make_rows(source, tokenizer, task, options)
    monkeypatch.setattr(preparing, "IN_MEMORY", 1000)
    kept = make_rows(source, tokenizer, task, options)
    assert len(stores(cache)) == 1
    assert isinstance(kept, MemoryRows)
    assert list(stored) == list(kept)
    assert stored.summary == kept.summary
    assert stored.summary.rows == 57
    assert stored.summary.rows_cut or stored.summary.rows_split or kind in ("sst2", "copa")
    assert stored.lengths.tolist() == kept.lengths.tolist()
    assert stored.lengths.tolist() == [sum(map(len, e.sequences)) for e in kept]
    assert stored.lengths.dtype == kept.lengths.dtype == np.int32


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", "list", "Hub"])
def test_every_source_gives_a_table_and_memory_the_same_rows(cache, tmp_path, monkeypatch, kind):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"{number} {row['text']}"} for number, row in enumerate(some_rows("text"))]
    if kind == ".json":
        (path := tmp_path / "rows.json").write_text(json.dumps(rows))
    else:
        (tmp_path / "hub").mkdir()
        suffix = kind if kind.startswith(".") else ".parquet"
        path = write_as(tmp_path / f"hub/train{suffix}", rows)
    source = FileSource(path, limit=50, skip=3)
    if kind == "list":
        source = ListSource(list(FileSource(path)), limit=50, skip=3)
    if kind == "Hub":
        source = HubSource(str(tmp_path / "hub"), "train", limit=50, skip=3)
    tokenizer = make_tokenizer("bos")
    table = make_rows(source, tokenizer, "text", Options())
    assert len(stores(cache)) == 1
    assert [tokenizer.decode(each.sequences[0][1:-1]).split()[0] for each in table] == [
        str(number) for number in range(3, 50)
    ]
    monkeypatch.setattr(preparing, "IN_MEMORY", 1000)
    kept = make_rows(source, tokenizer, "text", Options())
    assert (list(table), table.summary) == (list(kept), kept.summary)
    assert [table.content(place) for place in range(47)] == [each.content() for each in kept]


# --- the cache ---


def encode(path: Path, tokenizer=None, kind="text", fields=(), **options):
    """Return the rows of a file, and whether they were encoded or found."""
    seen: list[tuple[int, float]] = []
    source, tokenizer = FileSource(path, fields=dict(fields)), tokenizer or make_tokenizer("bos")
    rows = make_rows(
        source, tokenizer, kind, Options(**options), progress=lambda *at: seen.append(at)
    )
    return rows, bool(seen)


def test_content_decides_and_not_name_or_time(cache, tmp_path):
    rows = some_rows("text")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    first, made = encode(path)
    assert made
    before = path.stat()
    os.utime(path, (0, 0))
    again, made = encode(path.rename(tmp_path / "other.jsonl"))
    assert not made
    assert list(again) == list(first)
    rows[40]["text"] = rows[40]["text"][::-1]  # as long as it was
    write_rows(path, rows)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed, made = encode(path)
    assert made
    assert path.stat().st_size == before.st_size
    assert changed.summary.digest != first.summary.digest
    assert len(stores(cache)) == 2


@pytest.mark.parametrize("change", ["in place", "shorter"])
def test_a_file_that_changes_while_it_is_tokenised_is_refused(cache, tmp_path, change):
    """Its rows would be kept under the hash of the file as it was before."""
    rows = [{"text": f"{number} " + "dogs and cats " * 600} for number in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    before = path.read_bytes()
    after = {"in place": before.replace(b"dogs", b"cats"), "shorter": before[:-9000]}

    def tell(rows: int, share: float) -> None:
        path.write_bytes(after[change])

    tokenizer = make_tokenizer("bos")
    with pytest.raises(DataError, match=r"must not change while .*size or time of .*rows.jsonl"):
        make_rows(FileSource(path), tokenizer, "text", Options(), progress=tell)
    assert stores(cache) == []
    path.write_bytes(before)
    found = make_rows(FileSource(path), tokenizer, "text", Options())
    expected = [row["text"] for row in (rows[0], rows[-1])]
    assert [tokenizer.decode(found[at].sequences[0][1:-1]) for at in (0, -1)] == expected


def test_whatever_changes_the_tokens_makes_a_store_of_its_own(cache, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", some_rows("text"))
    chats = write_rows(tmp_path / "chats.jsonl", some_rows("chat"))
    words = [row["text"] for row in some_rows("text")]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"a": f" {w}", "b": " two"} for w in words])
    plain, other = make_tokenizer("bos"), make_tokenizer("bos eos")
    template = make_tokenizer("bos", CHAT)
    louder = make_tokenizer("bos", CHAT.replace("</s>", "!</s>"))
    cases = [
        (path, plain, "text", {}),
        (path, other, "text", {}),
        (path, plain, "text", {"max_length": 12}),
        (path, plain, "text", {"max_length": 12, "truncation": "left"}),
        (chats, template, "chat", {}),
        (chats, louder, "chat", {}),
        *((pairs, plain, "completion", {"fields": {"prompt": prompt, "completion": completion}})
          for prompt, completion in ("ab", "ba")),
    ]  # fmt: skip
    digests = set()
    for number, (file, tokenizer, kind, options) in enumerate(cases, start=1):
        rows, made = encode(file, tokenizer, kind, **options)
        digests.add(rows.summary.digest)
        assert made
        assert len(stores(cache)) == number
    assert len(digests) == 4  # of texts, chats, and pairs by either name
    for file, tokenizer, kind, options in cases:
        assert not encode(file, tokenizer, kind, **options)[1]
    monkeypatch.setattr(preparing, "_code", lambda: "another version of this room")
    assert encode(path)[1]


def test_a_table_that_is_not_whole_is_built_again(cache, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", some_rows("completion"))
    good = list(encode(path, kind="completion")[0])
    (folder,) = stores(cache)
    for name, left in itertools.product(("*.arrow", "summary.json"), (None, 0.5, 0.9)):
        file = max(folder.glob(name))
        content = file.read_bytes()
        if left is None:
            file.unlink()
        else:
            file.write_bytes(content[: int(len(content) * left)])
        rows, made = encode(path, kind="completion")
        assert made, (name, left)
        assert list(rows) == good
        assert stores(cache) == [folder]


def test_the_first_bad_row_is_named_and_leaves_nothing(cache, tmp_path):
    rows = some_rows("text", 100)
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": 5}, *rows, {"text": 6}])
    with pytest.raises(DataError, match=r"`text` must be a text \(got 5 at .*line 101\)"):
        encode(path)
    path = write_rows(tmp_path / "long.jsonl", [*rows, {"text": "dogs " * 90}, *rows])
    with pytest.raises(DataError, match=r"got 9. tokens for at most 60 at .*line 101\)"):
        encode(path, max_length=60, truncation="error")
    assert stores(cache) == []


def test_a_cache_that_cannot_be_written_says_what_to_do(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHAINLORA_CACHE", str(tmp_path / "file"))
    path = write_rows(tmp_path / "rows.jsonl", some_rows("text"))
    with pytest.raises(DataError, match=r"kept in the cache folder .*file .*CHAINLORA_CACHE"):
        encode(path)


# --- several processes, and dead ones ---

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


def building(path: Path, tell: Callable[[], object]) -> Callable[[], object]:
    """Return what encodes the rows of a file, and calls `tell` after each chunk."""
    keys = {"progress": lambda *_: tell()}
    return lambda: make_rows(FileSource(path), make_tokenizer("bos"), "text", Options(), **keys)


@needs_fork
def test_a_killed_builder_leaves_no_store_and_two_at_once_build_one(cache, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", some_rows("text", 2000))
    killed = live(building(path, lambda: signal.raise_signal(signal.SIGKILL)))
    assert killed.status == -signal.SIGKILL
    (beside,) = stores(cache)
    assert beside.name.endswith(".new")
    reader, writer = os.pipe()
    other = start(building(path, lambda: os.write(writer, b".")))
    os.read(reader, 1)  # it has begun
    assert not encode(path)[1]
    assert wait(other).status == 0
    (store,) = stores(cache)
    assert not store.name.endswith(".new")


@needs_fork
def test_an_interrupt_ends_it_and_leaves_no_store(cache, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", some_rows("text", 200))
    end = live(building(path, lambda: signal.raise_signal(signal.SIGINT)))
    assert (end.status, end.message) == (1, "interrupted")
    assert stores(cache) == []


def test_a_run_on_stored_rows_is_the_run_on_rows_in_memory(cache, tmp_path, configure, monkeypatch):
    monkeypatch.setattr(preparing, "IN_MEMORY", 10)
    seen = []
    stored = train(configure("stored"), listener=seen.append)
    told = [event for event in seen if event.name == "rows"]
    assert seen[: len(told)] == told  # before anything else
    ended = sorted((event.split, event.rows) for event in told if event.share == 1)
    assert ended == [("train", 32), ("validation", 16)]
    assert len(stores(cache)) == 2  # train, validation
    monkeypatch.setattr(preparing, "IN_MEMORY", 1000)
    kept = train(configure("kept"))
    assert_same_links(tmp_path / "stored", tmp_path / "kept")
    for result in (stored, kept):
        for key in ("wall_s", "peak_memory_mb"):
            del result[key]
    assert stored == kept
    assert json.loads(json.dumps(kept["data"])) == kept["data"]
