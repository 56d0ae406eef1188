"""Encode a source of rows: a small one in memory, a large one into a cached table.

The table is an Arrow file in the cache folder. Its name is the hash of everything that decides its
content: the bytes of the source, the tokenizer and its chat template, the task or format and its
options, the versions of the encoding libraries, and the code of this package. So a table is never
out of date, and can be deleted at any time. A row of the table is a chunk of rows, as the arrays of
`chainlora.data.rows.flatten`; ``summary.json`` beside it has their counts and digest.

One process encodes, so that Ctrl-C, a kill or a bad row ends the work at once. The tokenizer uses
threads of its own.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import check_fields
from chainlora.data.encoding import Options, RowEncoder, detect_format, with_usual_columns
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.examples import Example
from chainlora.data.rows import ARRAYS, MemoryRows, Rows, RowsSummary, StoredRows, flatten, joined
from chainlora.data.sources import Row, Source
from chainlora.data.tasks import Task
from chainlora.errors import DataError, FileError
from chainlora.files import checksums, make_folder, remove_scratch, replaced_folder
from chainlora.models.identity import cache_dir

IN_MEMORY = 2000
"""The most rows that stay in memory: they take a few MB and a fraction of a second to encode."""
_CHUNK = 500  # rows encoded at a time; the tokenizer's threads share them
_BATCH = 8
"""Chunks in a batch of the table. The file stores each column of a batch in one place, so that
`ends` is read without the pages of `tokens`."""
_TABLE, _SUMMARY = "rows.arrow", "summary.json"

EncodingProgress = Callable[[int, float], None]
"""Called now and then with the rows encoded so far and the share of the source, 0…1."""


def make_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    options: Options,
    *,
    progress: EncodingProgress | None = None,
) -> Rows:
    """Encode the rows of a source, or read them from the cache.

    `task` is a task, or a format of `data.format` ("auto" looks at the first row). Raises DataError
    for a bad row, which is named by file and line, and if all rows are too long.
    """
    is_auto, given = task == "auto", source.fields
    if is_auto:
        source = with_usual_columns(source, options.objective)
    head = list(islice(source, IN_MEMORY + 1))
    source.check_fields()
    kind = detect_format(head, options.objective) if is_auto else task
    if source.fields:
        try:
            check_fields(source.fields, str(kind))
        except ValueError as error:
            raise DataError(str(error)) from None
    encode = RowEncoder(kind, tokenizer, options)
    state = source.state()
    if len(head) <= IN_MEMORY:
        rows: Rows = MemoryRows([*chain.from_iterable(_chunks(head, encode))])
        rows.summary = encode.summary()
    else:
        key = _key([source.identity(), source.fields], tokenizer, kind, options)
        folder = cache_dir() / "rows" / key
        rows = _find(folder) or _build(folder, source, state, encode, progress)
    if is_auto and not given:
        has_template = bool(tokenizer.chat_template)
        rows.summary = _with_columns(rows.summary, str(kind), source.fields, head, has_template)
    elif is_auto:
        rows.summary = replace(rows.summary, recognised=str(kind) if kind in TRANSLATED else "")
    return rows


def _with_columns(
    summary: RowsSummary,
    kind: str,
    columns: Mapping[str, str],
    head: Sequence[Row],
    has_template: bool,
) -> RowsSummary:
    """Return a summary that says what `auto` detected: a format, or columns and ignored ones."""
    below, form = "", "a chat" if has_template else "two lines"
    if kind == "question":
        columns = columns or {"question": "question", "answer": "answer"}
    elif kind == "alpaca" and "output" in head[0]:
        columns = {"question": "instruction", "answer": "output"}
        below = " with input below it" * any(row.get("input") for row in head)
        form = "a chat" if has_template else "Alpaca's text"
    if not columns:
        return replace(summary, recognised=kind if kind in TRANSLATED else "")
    question, answer = columns["question"], columns["answer"]
    told = f"{question}{below} and {answer} are read as {form}"
    if summary.unread:
        told += f", {', '.join(summary.unread)} {'are' if summary.unread[1:] else 'is'} ignored"
    key = f"--data.fields '{{prompt: {question}, completion: {answer}}}'"
    key += " or --data.format text" * (question == "text")
    return replace(summary, columns=f"{told} (change with {key})", unread=())


def _chunks(rows: Iterable[Row], encode: RowEncoder) -> Iterator[list[Example]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield encode(chunk)


# --- the table ---


def _find(folder: Path) -> Rows | None:
    """Return the rows of a table, mapped into memory; None if it is missing or incomplete."""
    import pyarrow

    try:
        counts = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        parts = [
            StoredRows({name: np.from_dlpack(batch[name][row].values) for name in ARRAYS})
            for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / _TABLE)))
            for row in range(len(batch))
        ]
        summary = RowsSummary(**counts | {"unread": tuple(counts["unread"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = joined(parts)
    rows.summary = summary
    return rows if len(rows) == summary.examples else None


def _build(
    folder: Path,
    source: Source,
    state: object,
    encode: RowEncoder,
    progress: EncodingProgress | None,
) -> Rows:
    """Build a table of a source in this `state`, unless another process has built it meanwhile."""
    with _one_writer(folder):
        if (rows := _find(folder)) is not None:
            return rows
        with replaced_folder(folder) as scratch:
            try:
                summary = _write_table(scratch / _TABLE, source, encode, progress)
            finally:
                if source.state() != state:  # the table would have the hash of other rows
                    raise DataError(
                        "a data file must not change while its rows are tokenised",
                        f"another size or time of {source}",
                        "run the command again when no program writes to the file",
                    )
            (scratch / _SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")
        built = _find(folder)
        assert built is not None
        return built


def _write_table(
    path: Path, source: Source, encode: RowEncoder, progress: EncodingProgress | None
) -> RowsSummary:
    """Write a table and return its summary. Raises DataError for the first bad row."""
    import pyarrow

    def as_batch(chunks: Sequence[Sequence[Example]]) -> Any:
        flat = [{name: a.reshape(-1) for name, a in flatten(chunk).items()} for chunk in chunks]
        return pyarrow.RecordBatch.from_pylist(flat)

    num_rows, chunks, schema = source.num_rows(), _chunks(source, encode), as_batch([[]]).schema
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as table:
        while batch := list(islice(chunks, _BATCH)):
            table.write_batch(as_batch(batch))
            if progress is not None:
                progress(encode.sums["rows"], encode.sums["rows"] / num_rows)
    return encode.summary()


# --- the cache ---


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time build a table; the others wait and then find it."""
    try:
        make_folder(folder.parent)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            remove_scratch(folder.parent, folder.name)  # of processes killed while they built
            yield
    except (FileError, OSError) as error:
        raise DataError(
            f"tokenised rows must be kept in the cache folder {cache_dir()} (got: {error}); free "
            "disk space, or set CHAINLORA_CACHE to another folder"
        ) from error


def _key(
    source: object, tokenizer: PreTrainedTokenizerBase, kind: Task | str, options: Options
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = checksums(Path(folder))
    parts = {
        "source": source,
        "tokenizer": [type(tokenizer).__qualname__, saved],
        "task": kind.model_dump(mode="json") if isinstance(kind, Task) else kind,
        "options": asdict(options),
        "code": _code(),
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """Return the hash of the source code of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
