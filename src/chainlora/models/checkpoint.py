"""Write a transformers checkpoint, and read its tensors, whole or some of their rows.

Tensors are found by their names in the model. Reading uses memory maps, so it needs memory only for
the requested rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from chainlora.files import unwritable
from chainlora.models.identity import weight_files

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file."""

    file: Path
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, from the file's header."""
        with safe_open(self.file, framework="pt") as reader:
            return tuple(reader.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> str:
        """Name of the dtype in safetensors, from the file's header."""
        with safe_open(self.file, framework="pt") as reader:
            return str(reader.get_slice(self.key).get_dtype())

    def read(self, rows: slice = ALL) -> Tensor:
        """Return the tensor, or some of its rows, in its stored dtype."""
        with safe_open(self.file, framework="pt") as reader:
            if rows == ALL:
                return reader.get_tensor(self.key)
            part: Tensor = reader.get_slice(self.key)[rows]
            return part


class Checkpoint:
    """The tensors of a folder of safetensors; empty for None."""

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, Path] = {}
        for file in [] if folder is None else weight_files(folder):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as reader:
                    self._files |= dict.fromkeys(reader.keys(), file)

    def all(self) -> dict[str, Stored]:
        """Return all tensors by name."""
        return {key: Stored(file, key) for key, file in self._files.items()}

    def find(self, path: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        """Yield the tensors that may be the parameter `path` of a model, by name and shape.

        Names in files may lack the prefix of the model's body, or have another one.
        """
        tail = path.partition(".")[2]
        prefixed = (f"{prefix}.{path}" for prefix in ("model", "transformer"))
        for key in (path, tail, *prefixed):
            if key in self._files and (stored := Stored(self._files[key], key)).shape == shape:
                yield stored


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as a transformers checkpoint.

    Writes the generation config without validation: transformers reads contradictory flags, such
    as sampling values without do_sample, but refuses to write them.
    """
    generation = model.generation_config
    try:
        model.generation_config = type(generation)()
        model.save_pretrained(folder)
        generation.to_json_file(folder / "generation_config.json")
    except SafetensorError as error:  # safetensors reports a full disk with it
        raise unwritable(error, folder) from error
    finally:
        model.generation_config = generation
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer. Raises FileError if it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers reports a full disk with the bare class
            raise
        raise unwritable(error, folder) from error
