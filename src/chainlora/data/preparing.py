"""From a source of rows to `Rows`: in memory while they are few, else in a store that is kept.

A store is kept in the cache folder under the hash of all that decides what is in it: the content of
the source, the tokenizer and its chat template, the task or format and its options, the versions of
the libraries that encode, and the source code of this room. So a store is never out of date; one
that nobody wants any more can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path

import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import check_fields
from chainlora.data.encoding import Options, RowEncoder, detect_format, make_row_encoder
from chainlora.data.encoding.fitting import Counts
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.examples import Example
from chainlora.data.parallel import map_in_processes, num_workers
from chainlora.data.rows import COUNTED, MemoryRows, Rows, RowsSummary
from chainlora.data.sources import Chunk, Source
from chainlora.data.store import (
    Arrays,
    StoredRows,
    finish_store,
    flatten,
    mapped,
    open_store,
    write_arrays,
)
from chainlora.data.tasks import Task
from chainlora.errors import DataError, FileError
from chainlora.files import is_scratch, make_folder, remove, replaced_folder
from chainlora.models.hashing import cache_dir

IN_MEMORY = 2000
"""Rows up to which nothing is stored: they take a few MB and a fraction of a second."""
_CHUNK = 500  # rows encoded at a time: they keep a worker busy for some hundredths of a second

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
    rows: Rows
    if len(head) <= IN_MEMORY // _CHUNK:
        rows = _encode_in_memory(head, encode)
    else:
        content = source.identity()
        folder = cache_dir() / "rows" / _key([content, source.fields], tokenizer, kind, options)
        rows = open_store(folder) or _built(folder, source, content, encode, progress)
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


def _built(
    folder: Path,
    source: Source,
    content: str,
    encode: RowEncoder,
    progress: EncodingProgress | None,
) -> StoredRows:
    """Return the store that this process builds, or another that was faster.

    The rows are read from the beginning, and must be of the `content` that the store is named by.
    They go into a scratch folder that becomes the store at the end: it is whole or not there.
    """
    counts, digest = Counts(), hashlib.sha256()

    def work(chunk: Chunk) -> tuple[Arrays, Counts, bytes, float]:
        encoded = encode(chunk.rows())
        return flatten(encoded.examples), encoded.counts, encoded.digests, chunk.share

    def arrays() -> Generator[Arrays, None, None]:
        with closing(map_in_processes(work, source.chunks(_CHUNK), num_workers())) as parts:
            for part, found, digests, share in parts:
                counts.add(found)
                digest.update(digests)
                if progress is not None:
                    progress(counts.rows, share)
                yield part

    with _one_writer(folder):
        if (found := open_store(folder)) is not None:
            return found
        with replaced_folder(folder) as scratch, closing(arrays()) as parts:
            with _unchanged(source, content):
                examples, tokens = write_arrays(scratch, parts)
                counts.refuse_too_long(encode.fit.max_length)
            summary = _summary(counts, examples, tokens, digest.hexdigest())
            finish_store(scratch, summary)
        return mapped(folder, summary)


def _summary(counts: Counts, examples: int, tokens: int, digest: str) -> RowsSummary:
    found = {name: getattr(counts, name) for name in COUNTED}
    unread = tuple(counts.unread)
    return RowsSummary(examples=examples, tokens=tokens, unread=unread, digest=digest, **found)


@contextmanager
def _unchanged(source: Source, content: str) -> Iterator[None]:
    """Raise DataError where a source has changed meanwhile, whatever its rows were refused for."""
    refused = None
    try:
        yield
    except DataError as error:
        refused = error
    if source.identity() != content:
        raise DataError(
            "a data file must stay as it is while its rows are tokenised",
            f"other bytes in {source} than a moment before",
            "start again when nothing writes to it",
        ) from refused
    if refused is not None:
        raise refused


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
