"""Encode a source of rows: in memory while they are few, else into a cached table.

`datasets` builds the table, in worker processes. It is kept in the cache folder under the hash of
all that decides its content: the bytes of the source, the tokenizer and its chat template, the task
or format and its options, the versions of the libraries that encode, and the code of this package.
So a table is never out of date, and can be deleted at any time. A row of the table is a chunk of
rows, as the arrays of `chainlora.data.rows.flatten`, with their counts and digests.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import check_fields
from chainlora.data.encoding import Options, RowEncoder, detect_format, make_row_encoder
from chainlora.data.encoding.fitting import Counts
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.examples import Example
from chainlora.data.rows import COUNTED, MemoryRows, Rows, RowsSummary, StoredRows, flatten, joined
from chainlora.data.sources import Chunk, Source
from chainlora.data.tasks import Task
from chainlora.errors import DataError, FileError
from chainlora.files import is_scratch, make_folder, remove, replaced_folder
from chainlora.models.hashing import cache_dir

IN_MEMORY = 2000
"""Rows up to which nothing is stored: they take a few MB and a fraction of a second."""
_CHUNK = 500  # rows encoded at a time: they keep a worker busy for some hundredths of a second
_MOST_WORKERS = 16
_ARRAYS = ("tokens", "lines", "ends")  # of `flatten`

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
    head = list(islice(source.chunks(_CHUNK), IN_MEMORY // _CHUNK + 1))
    source.check_fields()
    kind = detect_format(head[0].rows(), options.objective) if task == "auto" else task
    if source.fields:
        try:
            check_fields(source.fields, str(kind))
        except ValueError as error:
            raise DataError(str(error)) from None
    encode = make_row_encoder(kind, tokenizer, options)
    recognised = str(kind) if task == "auto" and kind in TRANSLATED else ""
    state = source.state()
    rows: Rows
    if len(head) <= IN_MEMORY // _CHUNK:
        rows = _encode_in_memory(head, encode)
    else:
        key = _key([source.identity(), source.fields], tokenizer, kind, options)
        folder = cache_dir() / "rows" / key
        rows = _find(folder) or _build(folder, source, state, encode, progress)
    rows.summary = replace(rows.summary, recognised=recognised)
    return rows


def _encode_in_memory(chunks: Sequence[Chunk], encode: RowEncoder) -> MemoryRows:
    counts, examples, digest = Counts(), list[Example](), hashlib.sha256()
    for chunk in chunks:
        encoded = encode(chunk.rows())
        counts.add(encoded.counts)
        examples += encoded.examples
        digest.update(encoded.digests)
    counts.refuse_too_long(encode.fit.max_length)
    rows = MemoryRows(examples)
    rows.summary = _summary(counts, len(rows), int(rows.lengths.sum()), digest.hexdigest())
    return rows


def _summary(counts: Counts, examples: int, tokens: int, digest: str) -> RowsSummary:
    found = {name: getattr(counts, name) for name in COUNTED}
    unread = tuple(counts.unread)
    return RowsSummary(examples=examples, tokens=tokens, unread=unread, digest=digest, **found)


# --- the table ---


def _open(folder: Path, max_length: int | None) -> Rows:
    """Map a table into memory. Raises OSError, ValueError or KeyError where none is whole.

    Raises DataError for rows that are too long.
    """
    import pyarrow

    counts, digest, parts, num_chunks = Counts(), hashlib.sha256(), list[StoredRows](), -1
    for path in sorted(folder.glob("*.arrow")):
        for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))):
            for row in map(batch.slice, range(len(batch)), repeat(1)):
                lists = {name: row[name][0].values for name in _ARRAYS}
                parts.append(StoredRows({k: np.from_dlpack(each) for k, each in lists.items()}))
                counts.add(Counts(**json.loads(row["counts"][0].as_py())))
                digest.update(row["digests"][0].as_buffer())
                num_chunks = row["num_chunks"][0].as_py()
    if len(parts) != num_chunks:
        raise ValueError(f"{len(parts)} of {num_chunks} chunks")
    counts.refuse_too_long(max_length)
    rows = joined(parts)
    rows.summary = _summary(counts, len(rows), int(rows.lengths.sum()), digest.hexdigest())
    return rows


def _find(folder: Path) -> Rows | None:
    """Return the rows of a finished table, or None where there is none or it cannot be read."""
    try:
        return _open(folder, None)
    except (OSError, ValueError, KeyError):
        return None


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
                _open(scratch, encode.fit.max_length)
            finally:
                if source.state() != state:
                    raise DataError(
                        "a data file must stay as it is while its rows are tokenised",
                        f"another size or time of {source}",
                        "start again when nothing writes to it",
                    )
        return _open(folder, None)


@dataclass
class _Job:
    """The rows that forked workers encode, each consecutive chunks of `source`."""

    source: Source
    encode: RowEncoder
    folder: Path
    num_chunks: int
    chunks: Iterator[Chunk] | None = None
    thread: int = field(default_factory=threading.get_ident)  # that forks them

    def __call__(self, number: int, rank: int) -> dict[str, list[Any]]:
        """Return a chunk as a row of the table; a worker stops when one of lower rank failed.

        `datasets` waits for all workers, and raises the error of the lowest rank.
        """
        if any((self.folder / f"{lower}.failed").exists() for lower in range(rank)):
            raise DataError("a row before must be correct")
        try:
            if self.chunks is None:
                self.chunks = self.source.chunks(_CHUNK, number * _CHUNK)
            encoded = self.encode(next(self.chunks).rows())
        except Exception:
            (self.folder / f"{rank}.failed").touch()
            raise
        arrays = flatten(encoded.examples)
        return {name: [arrays[name].reshape(-1)] for name in _ARRAYS} | {
            "counts": [json.dumps(asdict(encoded.counts))],
            "digests": [encoded.digests],
            "num_chunks": [self.num_chunks],
        }


_job: _Job | None = None  # workers are forked with it: no copy for each
_building = threading.Lock()  # of `_job`


def _encode_chunk(numbers: list[int], rank: int | None) -> dict[str, list[Any]]:
    assert _job is not None
    return _job(numbers[0], rank or 0)


def _write_table(
    folder: Path, source: Source, encode: RowEncoder, progress: EncodingProgress | None
) -> None:
    import multiprocess
    from datasets import Dataset

    global _job
    num_rows = source.num_rows()
    num_chunks = -(-num_rows // _CHUNK)
    workers = min(_MOST_WORKERS, _num_cores(), num_chunks)
    if multiprocess.get_start_method() != "fork":  # Windows, macOS
        workers = 1
    with _building, _progress_of_datasets(num_rows, progress):
        _job = _Job(source, encode, folder, num_chunks)
        try:
            Dataset.from_dict({"chunk": list(range(num_chunks))}).map(
                _encode_chunk,
                input_columns="chunk",
                remove_columns="chunk",
                batched=True,
                batch_size=1,
                with_rank=True,
                num_proc=workers if workers > 1 else None,
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint=folder.name[:32],  # its key: no hash of a function
            )
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # lost by the pool of `datasets`
                raise KeyboardInterrupt from None
            raise
        finally:
            _job = None


@contextmanager
def _progress_of_datasets(num_rows: int, progress: EncodingProgress | None) -> Iterator[None]:
    """Call `progress` in place of the progress bar of `datasets`."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        tqdm,
    )

    done, update, was_disabled = 0, tqdm.update, are_progress_bars_disabled()

    def tell(bar: object, chunks: int) -> None:
        nonlocal done
        done += chunks
        if chunks and progress is not None:
            rows = min(done * _CHUNK, num_rows)
            progress(rows, rows / num_rows)

    disable_progress_bars()
    tqdm.update = tell
    try:
        yield
    finally:
        tqdm.update = update
        if not was_disabled:
            enable_progress_bars()


def _num_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl

    def _begin_worker() -> None:
        """Let workers end with their parent, even a killed one, and by it alone on Ctrl-C."""
        if _job is not None and _job.thread == threading.get_ident():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    os.register_at_fork(after_in_child=_begin_worker)


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
    parts = {
        "source": source,
        "tokenizer": _fingerprint(tokenizer),
        "task": kind.model_dump(mode="json") if isinstance(kind, Task) else kind,
        "options": asdict(options),
        "code": _code(),
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of all that a tokenizer does with a text or a chat."""
    found = hashlib.sha256()
    if tokenizer.is_fast:
        found.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).iterdir()):
                found.update(path.read_bytes())
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    split = getattr(tokenizer, "split_special_tokens", None)
    for part in (type(tokenizer).__qualname__, special, tokenizer.chat_template, split):
        found.update(f"\n{part!r}".encode())
    return found.hexdigest()


@cache
def _code() -> str:
    """Return the hash of the source code of this room: what it does today."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
