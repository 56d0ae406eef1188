"""Every exception chainlora raises on purpose.

    ChainLoRAError              our error: one line, exit status 1
    ├── ConfigError             a key, value or combination that cannot work
    ├── DataError               rows that cannot be read, rendered or fit
    ├── ModelError              a model that cannot be loaded, adapted or matched
    │   └── ScoreError          a model whose scores are not numbers
    ├── ChainError              a chain asked to do what its state does not allow
    ├── FileError               a file or folder that cannot be read or written
    ├── RunError                a run directory that is missing, incomplete, damaged or in use
    ├── ForgettingError         what was added made a run forget too much; exit status 3
    └── TrainingError           training that must not continue
        ├── DivergedError       the loss, its gradient or the weights are no longer finite
        ├── ToldError           of several processes, another one says what went wrong
        └── StoppedError        a signal asked the run to stop; its state is saved

A message is one line that names the rule, the value and the remedy. Give the three apart, and they
are joined in the same way everywhere:

    raise ConfigError("`rank` must be at least 1", got=0, remedy="give 1 or more")
    # `rank` must be at least 1 (got 0); give 1 or more
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ChainLoRAError(Exception):
    """Base of all errors raised on purpose. The message becomes one line that can be printed."""

    def __init__(self, rule: str = "", got: object = "", remedy: str = "") -> None:
        super().__init__(one_line(sentence(rule, got, remedy)))


class ConfigError(ChainLoRAError):
    """A key, value or combination of values that cannot work."""


class DataError(ChainLoRAError):
    """Rows that cannot be read, rendered, tokenised or fit."""


class ModelError(ChainLoRAError):
    """A model that cannot be loaded, adapted or matched to its fingerprint."""


class ScoreError(ModelError):
    """A model whose scores are not numbers."""


class ChainError(ChainLoRAError):
    """A chain asked to do what its state does not allow."""


class FileError(ChainLoRAError):
    """A file or folder that cannot be read or written."""


class RunError(ChainLoRAError):
    """A run directory that is missing, incomplete, damaged or in use."""


class ForgettingError(ChainLoRAError):
    """What was added made a run forget more than was allowed; the run is what it was before."""


class TrainingError(ChainLoRAError):
    """Training that must not continue."""


class DivergedError(TrainingError):
    """The loss, its gradient or the weights are no longer finite: a result of the learning rate."""


class ToldError(TrainingError):
    """Another process of the run failed, and the first one says how."""


class StoppedError(TrainingError):
    """A signal asked the run to stop, and its state is saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def explained(rule: str, place: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises inside the block, of any kind, into a ModelError."""
    try:
        yield
    except ChainLoRAError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error!s:.200} {place}"
        raise ModelError(rule, got, remedy) from error


# What torch, its allocators and the system call it, on CPUs and accelerators.
_NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out: by Python's own error, or by the words of torch's."""
    if not isinstance(error, RuntimeError | OSError):
        return isinstance(error, MemoryError)
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def sentence(rule: str, got: object = "", remedy: str = "") -> str:
    """Join what a message says: ``rule (got …); remedy``. What is empty is left out."""
    value = f" (got {got})" if str(got) else ""
    return f"{rule}{value}" + (f"; {remedy}" if remedy else "")


def one_line(text: str) -> str:
    """Join lines, and write as escapes what cannot be printed: users' own keys and values."""
    return printable(" ".join(part for line in text.splitlines() if (part := line.strip())))


def printable(text: str) -> str:
    """Write control characters but tabs and line ends, which a terminal would obey, as escapes, and
    halves of surrogate pairs. A text in JSON stays the same JSON."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ``; did you mean 'rank'?``, or the known words where none is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
