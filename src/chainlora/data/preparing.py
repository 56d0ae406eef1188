"""Encode a source of rows: in memory while they are few, else into a cached table.

`datasets` builds the table, in worker processes. It is kept in the cache folder under the hash of
all that decides its content: the bytes of the source, the tokenizer and its chat template, the task
or format and its options, the versions of the libraries that encode, and the code of this package.
So a table is never out of date, and can be deleted at any time. A row of the table is a chunk of
rows, as the arrays of `chainlora.data.rows.flatten`, with their counts and digests;
``summary.json`` beside it is the summary of all.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
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
_CHUNK = 500  # rows encoded at a time: they keep a worker busy for some hundredths of a second
_BATCH = 8
"""Chunks in a batch of the table. Each column of a batch is in one place of the file, so that what
ends the rows is read without the pages of the rows."""
_MOST_WORKERS = 16
_SUMMARY = "summary.json"

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
    counts, examples, digest = Counts(), list[Example](), hashlib.sha256()
    for first in range(0, len(rows), _CHUNK):
        encoded = encode(rows[first : first + _CHUNK])
        counts.add(encoded.counts)
        examples += encoded.examples
        digest.update(encoded.digests)
    counts.refuse_too_long(encode.fit.max_length)
    found = MemoryRows(examples)
    found.summary = counts.summary(digest.hexdigest())
    return found


# --- the table ---


def _find(folder: Path) -> Rows | None:
    """Return the rows of a table, mapped into memory, or None where none is whole."""
    import pyarrow

    try:
        kept = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        parts = [
            StoredRows({name: np.from_dlpack(batch[name][row].values) for name in ARRAYS})
            for path in sorted(folder.glob("*.arrow"))
            for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            for row in range(len(batch))
        ]
        summary = RowsSummary(**kept | {"unread": tuple(kept["unread"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = joined(parts)
    rows.summary = summary
    return rows if len(rows) == summary.examples else None


def _summarise(folder: Path, max_length: int | None) -> RowsSummary:
    """Return the summary of a table just written. Raises DataError for rows that are too long."""
    import pyarrow

    counts, digest = Counts(), hashlib.sha256()
    for path in sorted(folder.glob("*.arrow")):
        with pyarrow.OSFile(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                for said, digests in zip(batch["counts"], batch["digests"], strict=True):
                    counts.add(Counts(**json.loads(said.as_py())))
                    digest.update(digests.as_py())
    counts.refuse_too_long(max_length)
    return counts.summary(digest.hexdigest())


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
                _write_table(scratch, source, encode, progress)
                summary = _summarise(scratch, encode.fit.max_length)
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


# --- processes ---


@dataclass
class _Job:
    """Rows to encode by forked workers, which `tell` how many chunks are done, or the error."""

    source: Source
    encode: RowEncoder
    folder: Path
    num_chunks: int
    tell: Callable[[int | Exception], object]
    rows: Iterator[Row] | None = None  # of a worker, from its first chunk on


_job: _Job | None = None  # workers are forked with it: no copy for each


def _encode_chunks(numbers: Sequence[int]) -> dict[str, list[Any]]:
    """Return the chunks of consecutive numbers as rows of the table."""
    assert _job is not None
    if _job.rows is None:
        _job.rows = _job.source.rows(numbers[0] * _CHUNK)
    columns: dict[str, list[Any]] = {name: [] for name in (*ARRAYS, "counts", "digests")}
    try:
        for _ in numbers:
            encoded = _job.encode(list(islice(_job.rows, _CHUNK)))
            arrays = flatten(encoded.examples)
            for name in ARRAYS:
                columns[name].append(arrays[name].reshape(-1))
            columns["counts"].append(json.dumps(asdict(encoded.counts)))
            columns["digests"].append(encoded.digests)
    except DataError as error:  # `datasets` would say so when all workers are done
        _job.tell(error)
        raise
    _job.tell(len(numbers))
    return columns


def _map_chunks(job: _Job, workers: int | None) -> None:
    from datasets import Dataset, disable_progress_bars

    global _job
    _job = job
    disable_progress_bars()
    Dataset.from_dict({"chunk": list(range(job.num_chunks))}).map(
        _encode_chunks,
        input_columns="chunk",
        remove_columns="chunk",
        batched=True,
        batch_size=_BATCH,
        num_proc=workers,
        cache_file_name=str(job.folder / "rows.arrow"),
        new_fingerprint=job.folder.name[:32],  # its key: no hash of a function
    )
    _job = None


def _write_table(
    folder: Path, source: Source, encode: RowEncoder, progress: EncodingProgress | None
) -> None:
    """Write a table in forked processes, or in this one where there is no fork (Windows, macOS).

    The pool of `datasets` has a process of its own, because it can hang when it is interrupted, and
    leaves its workers when it is killed.
    """
    num_rows, done = source.num_rows(), 0
    num_chunks = -(-num_rows // _CHUNK)

    def tell(message: int | Exception) -> None:
        nonlocal done
        if isinstance(message, Exception):
            raise message
        done += message
        if progress is not None:
            rows = min(done * _CHUNK, num_rows)
            progress(rows, rows / num_rows)

    job = _Job(source, encode, folder, num_chunks, tell)
    if sys.platform != "linux":
        _map_chunks(job, None)
        return
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    job.tell = sender.send
    process = fork.Process(target=_run_job, args=(job, sender))
    process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            tell(message)
    except EOFError:
        raise DataError(
            "the processes that encode rows must live to the end (got one that was killed, as a "
            "machine short of memory does); free some memory and try again"
        ) from None
    finally:
        process.kill()
        process.join()


def _run_job(job: _Job, sender: Connection) -> None:
    """Run a job in this process and workers of it; send an error or None at the end."""
    import multiprocess

    thread = threading.get_ident()

    def begin_worker() -> None:
        if threading.get_ident() == thread:  # a worker of another thread would end with that
            _end_with_parent()

    _end_with_parent()
    os.register_at_fork(after_in_child=begin_worker)
    multiprocess.set_start_method("fork", force=True)
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)), job.num_chunks)
    try:
        _map_chunks(job, workers if workers > 1 else None)
        sender.send(None)
    except Exception as error:
        sender.send(error)


def _end_with_parent() -> None:
    """Let Linux kill this process when its parent ends; on Ctrl-C the first parent does that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
