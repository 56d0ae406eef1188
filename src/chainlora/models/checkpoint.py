"""Tensors of a checkpoint, by the names that a model has for them, whole or some rows of them.

They are read by memory map: no memory but that of what is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file."""

    file: Path
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        with safe_open(self.file, framework="pt") as reader:
            return tuple(reader.get_slice(self.key).get_shape())

    def read(self, rows: slice = ALL) -> Tensor:
        """Return it, or rows of it, in the dtype that it is stored in."""
        with safe_open(self.file, framework="pt") as reader:
            if rows == ALL:
                return reader.get_tensor(self.key)
            found: Tensor = reader.get_slice(self.key)[rows]
            return found


class Checkpoint:
    """The tensors of a folder of safetensors; of None, none."""

    def __init__(self, folder: Path | None) -> None:
        self._files = {} if folder is None else _index(folder)

    def find(self, path: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        """Yield the tensors of this shape that may be the parameter `path` of a model: names differ
        by the prefix of the model's body."""
        tail = path.partition(".")[2]
        prefixed = (f"{prefix}.{path}" for prefix in ("model", "transformer"))
        for key in (path, tail, *prefixed):
            if key in self._files and (stored := Stored(self._files[key], key)).shape == shape:
                yield stored


def _index(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {key: folder / name for key, name in weight_map.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    return {}
