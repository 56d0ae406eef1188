"""All exceptions that chainlora raises on purpose.

    ChainLoRAError              base class: one line, exit status 1
    ├── ConfigError             a key, value or combination of values is invalid
    ├── DataError               rows cannot be read, rendered, tokenised or fitted
    ├── ModelError              a model cannot be loaded, adapted or matched
    │   └── ScoreError          the scores of a model are not numbers
    ├── ChainError              the state of a chain does not allow the call
    ├── FileError               a file or folder cannot be read or written
    ├── RunError                a run directory is missing, incomplete, damaged or in use
    ├── ForgettingError         an addition made a run forget too much; exit status 3
    └── TrainingError           training cannot continue
        ├── DivergedError       the loss, its gradient or the weights are no longer finite
        ├── PeerFailedError     another process failed and reports the error
        └── StoppedError        a signal stopped the run; its state is saved

A message is one line with the rule, the value and the remedy. Pass the three parts separately, so
that all messages have the same form:

    raise ConfigError("`rank` must be at least 1", got=0, remedy="give 1 or more")
    # `rank` must be at least 1 (got 0); give 1 or more
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ChainLoRAError(Exception):
    """Base class of all errors that chainlora raises on purpose.

    The message is one line without control characters: ``rule (got got); remedy``.
    """

    def __init__(self, rule: str = "", got: object = "", remedy: str = "") -> None:
        super().__init__(one_line(sentence(rule, got, remedy)))


class ConfigError(ChainLoRAError):
    """A key, value or combination of values is invalid."""


class DataError(ChainLoRAError):
    """Rows cannot be read, rendered, tokenised or fitted into the context."""


class ModelError(ChainLoRAError):
    """A model cannot be loaded or adapted, or does not match a fingerprint."""


class ScoreError(ModelError):
    """The scores of a model are not numbers."""


class ChainError(ChainLoRAError):
    """The state of a chain does not allow the call."""


class FileError(ChainLoRAError):
    """A file or folder cannot be read or written."""


class RunError(ChainLoRAError):
    """A run directory is missing, incomplete, damaged or in use."""


class ForgettingError(ChainLoRAError):
    """An addition made a run forget more than was allowed; the run is unchanged."""


class TrainingError(ChainLoRAError):
    """Training cannot continue."""


class DivergedError(TrainingError):
    """The loss, its gradient or the weights are no longer finite, e.g. if the rate is too high."""


class PeerFailedError(TrainingError):
    """Another process of the run failed and reports the error."""


class StoppedError(TrainingError):
    """A signal stopped the run, and its state is saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def explained(rule: str, place: str, remedy: str) -> Iterator[None]:
    """Turn any exception of a library inside the block into a ModelError."""
    try:
        yield
    except ChainLoRAError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error!s:.200} {place}"
        raise ModelError(rule, got, remedy) from error


# Messages of torch, its allocators and the system, on CPUs and accelerators.
_NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a MemoryError, or an error of torch with such a message."""
    if not isinstance(error, RuntimeError | OSError):
        return isinstance(error, MemoryError)
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def sentence(rule: str, got: object = "", remedy: str = "") -> str:
    """Return a message ``rule (got …); remedy``, without empty parts."""
    value = f" (got {got})" if str(got) else ""
    return f"{rule}{value}" + (f"; {remedy}" if remedy else "")


def one_line(text: str) -> str:
    """Return a text as one line, with escapes for control characters of users' keys and values."""
    return printable(" ".join(part for line in text.splitlines() if (part := line.strip())))


def printable(text: str) -> str:
    """Return a text with escapes for control characters, which a terminal would obey.

    Also escapes halves of surrogate pairs; keeps tabs and line ends. JSON stays the same JSON.
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint ``; did you mean 'rank'?``, or all known words if no word is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
