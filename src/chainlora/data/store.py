"""Tokenised rows on disk: flat arrays with offsets, mapped into memory and read a row at a time.

A store is a folder of raw little-endian arrays and ``store.json``. With N examples of S sequences
of T tokens, P scored spans and B bytes of text:

    tokens          int32 T     the tokens of all sequences, one after another
    sequence_ends   int64 S     where each sequence ends in `tokens`
    example_ends    int64 N     where each example ends in the sequences
    spans           int32 2·P   [start, end) of what is scored
    span_ends       int64 S     where the spans of each sequence end
    rows, labels    int64 N     number of the row in its split; right candidate or −1
    texts           uint8 B     JSON of references and names, nothing where an example has neither
    text_ends       int64 N     where the text of each example ends

``store.json`` holds the size and SHA-256 of every array and the summary of the rows; it is written
last, and a store that does not agree with it is built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example
from chainlora.data.rows import Rows, RowsSummary
from chainlora.files import sha256

_TYPES: dict[str, Any] = {
    "tokens": np.dtype("<i4"),
    "sequence_ends": np.dtype("<i8"),
    "example_ends": np.dtype("<i8"),
    "spans": np.dtype("<i4"),
    "span_ends": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "labels": np.dtype("<i8"),
    "texts": np.dtype("u1"),
    "text_ends": np.dtype("<i8"),
}
_ENDS = {  # offsets, and the array whose length they count (of spans, the pairs)
    "sequence_ends": "tokens",
    "example_ends": "sequence_ends",
    "span_ends": "spans",
    "text_ends": "texts",
}
_INDEX = "store.json"
_FORMAT = 1

Arrays = Mapping[str, NDArray[Any]]


def flatten(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Return examples as the arrays of a store, offsets counted from 0."""
    sequences = [tokens for example in examples for tokens in example.sequences]
    scored = [spans for example in examples for spans in example.scored]
    texts = [_text(example) for example in examples]
    bounds = [bound for spans in scored for span in spans for bound in span]
    found = {
        "tokens": np.fromiter(chain.from_iterable(sequences), _TYPES["tokens"]),
        "sequence_ends": np.cumsum([len(tokens) for tokens in sequences]),
        "example_ends": np.cumsum([len(example.sequences) for example in examples]),
        "spans": np.array(bounds),
        "span_ends": np.cumsum([len(spans) for spans in scored]),
        "rows": np.array([example.row for example in examples]),
        "labels": np.array([-1 if e.label is None else e.label for e in examples]),
        "texts": np.frombuffer(b"".join(texts), _TYPES["texts"]),
        "text_ends": np.cumsum([len(text) for text in texts]),
    }
    return {name: array.astype(_TYPES[name], copy=False) for name, array in found.items()}


def _text(example: Example) -> bytes:
    texts = [example.references, example.names]
    return json.dumps(texts).encode() if any(texts) else b""


class StoreWriter:
    """Appends arrays to a store that is being built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {
            name: self._open.enter_context((folder / name).open("wb")) for name in _TYPES
        }
        self._hashes = {name: hashlib.sha256() for name in _TYPES}
        self._counts = dict.fromkeys(_TYPES, 0)

    def __enter__(self) -> StoreWriter:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._open.close()

    def append(self, arrays: Arrays) -> None:
        """Add the arrays that `flatten` gave of the next examples."""
        bases = {name: self._counts[of] for name, of in _ENDS.items()}
        bases["span_ends"] //= 2
        for name, array in arrays.items():
            content = (array + bases[name] if name in bases else array).astype(_TYPES[name])
            data = content.tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)
            self._counts[name] += len(array)

    @property
    def num_examples(self) -> int:
        """Return how many examples there are so far."""
        return self._counts["rows"]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens there are so far."""
        return self._counts["tokens"]

    def finish(self, summary: RowsSummary) -> None:
        """Write ``store.json``, which makes the folder a store."""
        for file in self._files.values():
            file.flush()
        index = {
            "format": _FORMAT,
            "summary": asdict(summary),
            "arrays": {
                name: {"count": self._counts[name], "sha256": self._hashes[name].hexdigest()}
                for name in _TYPES
            },
        }
        (self.folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


class StoredRows(Rows):
    """Rows in the arrays that `flatten` gives of them. Safe to read from several threads."""

    def __init__(self, arrays: Arrays, summary: RowsSummary) -> None:
        self._arrays, self.summary = arrays, summary
        self._lengths = self._count_tokens()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._arrays["rows"])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""
        return self._lengths

    def example(self, index: int) -> Example:
        """Return one row."""
        arrays = self._arrays
        first, last = _bounds(arrays["example_ends"], index)
        sequences, scored = [], []
        for place in range(first, last):
            start, end = _bounds(arrays["sequence_ends"], place)
            sequences.append(tuple(arrays["tokens"][start:end].tolist()))
            start, end = _bounds(arrays["span_ends"], place)
            flat = arrays["spans"][2 * start : 2 * end].tolist()
            scored.append(tuple(zip(flat[::2], flat[1::2], strict=True)))
        references, names = self._texts(index)
        label = int(arrays["labels"][index])
        return Example(
            int(arrays["rows"][index]),
            tuple(sequences),
            tuple(scored),
            None if label < 0 else label,
            references,
            names,
        )

    def _texts(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        start, end = _bounds(self._arrays["text_ends"], index)
        if start == end:
            return (), ()
        references, names = json.loads(self._arrays["texts"][start:end].tobytes())
        return tuple(references), tuple(names)

    def _count_tokens(self) -> NDArray[np.int32]:
        last = self._arrays["example_ends"] - 1
        ends = self._arrays["sequence_ends"][last]
        return np.diff(ends, prepend=0).astype(np.int32)


def open_store(folder: Path) -> StoredRows | None:
    """Return the rows of a store, or None where there is none or it is damaged."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        whole = index["format"] == _FORMAT and all(
            sha256(folder / name) == index["arrays"][name]["sha256"] for name in _TYPES
        )
        summary = index["summary"]
        summary["unread"] = tuple(summary["unread"])
        return mapped(folder, RowsSummary(**summary)) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped(folder: Path, summary: RowsSummary) -> StoredRows:
    """Return the rows of a store that was just built or checked."""
    arrays = {name: _map(folder / name, dtype) for name, dtype in _TYPES.items()}
    return StoredRows(arrays, summary)


def _map(path: Path, dtype: Any) -> NDArray[Any]:
    if not path.stat().st_size:  # nothing to map
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


def _bounds(ends: NDArray[Any], index: int) -> tuple[int, int]:
    return (int(ends[index - 1]) if index else 0), int(ends[index])
