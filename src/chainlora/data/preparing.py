"""Encode a source of rows: in memory while they are few, else into a cached table.

The table is an Arrow file in the cache folder, under the hash of all that decides its content: the
bytes of the source, the tokenizer and its chat template, the task or format and its options, the
versions of the libraries that encode, and the code of this package. So a table is never out of
date, and can be deleted at any time. A row of the table is a chunk of rows, as the arrays of
`chainlora.data.rows.flatten`; ``summary.json`` beside it has their counts and digest.

One process encodes: the threads of the tokenizer share its part, and Ctrl-C, a kill or a bad row
end the work at once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import check_fields
from chainlora.data.encoding import Options, RowEncoder, detect_format, make_row_encoder
from chainlora.data.encoding.encoder import Counts
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.examples import Example
from chainlora.data.rows import ARRAYS, MemoryRows, Rows, RowsSummary, StoredRows, flatten, joined
from chainlora.data.sources import Row, Source
from chainlora.data.tasks import Task
from chainlora.errors import DataError, FileError
from chainlora.files import checksums, is_scratch, make_folder, remove, replaced_folder
from chainlora.models.identity import cache_dir

IN_MEMORY = 2000
"""Rows up to which nothing is stored: they take a few MB and a fraction of a second."""
_CHUNK = 500  # rows encoded at a time: the tokenizer's threads share them
_BATCH = 8
"""Chunks in a batch of the table. Each column of a batch is in one place of the file, so that what
ends the rows is read without the pages of the rows."""
_TABLE, _SUMMARY = "rows.arrow", "summary.json"

EncodingProgress = Callable[[int, float], None]
"""Told (rows encoded so far, share of the source in 0…1) now and then."""


def make_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    options: Options,
    *,
    progress: EncodingProgress | None = None,
) -> Rows:
    """Encode the rows of a source, or find them encoded.

    `task` is a task, or a format: "completion", "chat", "text" or "auto". Raises DataError or
    ConfigError, after reading all rows where only that can tell.
    """
    head = list(islice(source, IN_MEMORY + 1))
    source.check_fields()
    kind = detect_format(head, options.objective) if task == "auto" else task
    if source.fields:
        try:
            check_fields(source.fields, str(kind))
        except ValueError as error:
            raise DataError(str(error)) from None
    encode = make_row_encoder(kind, tokenizer, options)
    recognised = str(kind) if task == "auto" and kind in TRANSLATED else ""
    state = source.state()
    if len(head) <= IN_MEMORY:
        rows: Rows = _encode_in_memory(head, encode)
    else:
        key = _key([source.identity(), source.fields], tokenizer, kind, options)
        folder = cache_dir() / "rows" / key
        rows = _find(folder) or _build(folder, source, state, encode, progress)
    rows.summary = replace(rows.summary, recognised=recognised)
    return rows


def _encode_in_memory(rows: Sequence[Row], encode: RowEncoder) -> MemoryRows:
    encoded = _Encoding(rows, encode)
    found = MemoryRows([example for chunk in encoded for example in chunk])
    found.summary = encoded.summary()
    return found


class _Encoding:
    """Rows that are encoded chunk by chunk; what is counted of them adds up."""

    def __init__(self, rows: Iterable[Row], encode: RowEncoder) -> None:
        self._rows, self._encode = rows, encode
        self.counts, self._digest = Counts(), hashlib.sha256()

    def __iter__(self) -> Iterator[list[Example]]:
        """Yield the chunks. Raises DataError for the first bad row."""
        rows = iter(self._rows)
        while chunk := list(islice(rows, _CHUNK)):
            encoded = self._encode(chunk)
            self.counts.add(encoded.counts)
            self._digest.update(encoded.digests)
            yield encoded.examples

    def summary(self) -> RowsSummary:
        """Return the summary, at the end. Raises DataError for rows that are too long."""
        self.counts.refuse_too_long(self._encode.fit.max_length)
        return self.counts.summary(self._digest.hexdigest())


# --- the table ---


def _find(folder: Path) -> Rows | None:
    """Return the rows of a table, mapped into memory, or None where none is whole."""
    import pyarrow

    try:
        kept = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        parts = [
            StoredRows({name: np.from_dlpack(batch[name][row].values) for name in ARRAYS})
            for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / _TABLE)))
            for row in range(len(batch))
        ]
        summary = RowsSummary(**kept | {"unread": tuple(kept["unread"])})
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
    """Return the rows of a table that this process builds, or another that was faster.

    It is built in a scratch folder, which is renamed at the end. Raises DataError where the source
    is not in `state` any more, as its rows would be kept under the hash of other ones.
    """
    with _one_writer(folder):
        if (found := _find(folder)) is not None:
            return found
        with replaced_folder(folder) as scratch:
            try:
                summary = _write_table(scratch / _TABLE, source, encode, progress)
            finally:
                if source.state() != state:
                    raise DataError(
                        "a data file must stay as it is while its rows are tokenised",
                        f"another size or time of {source}",
                        "start again when nothing writes to it",
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

    num_rows, encoded = source.num_rows(), _Encoding(source, encode)
    chunks, schema = iter(encoded), as_batch([[]]).schema
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as table:
        while some := list(islice(chunks, _BATCH)):
            table.write_batch(as_batch(some))
            if progress is not None:
                progress(encoded.counts.rows, encoded.counts.rows / num_rows)
    return encoded.summary()


# --- the cache ---


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time build a store; the others wait, and find it built."""
    try:
        make_folder(folder.parent)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            for entry in folder.parent.glob(f"{folder.name}.*"):
                if is_scratch(entry.name):  # of a process that was killed while it built
                    remove(entry)
            yield
    except (FileError, OSError) as error:
        raise DataError(
            f"tokenised rows must be kept in the cache folder {cache_dir()} (got: {error}); make "
            "room there, or set CHAINLORA_CACHE to another folder"
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
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
