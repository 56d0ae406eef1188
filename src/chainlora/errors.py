"""Every exception chainlora raises on purpose.

    ChainLoRAError                 our error: one line, exit status 1 ├── ConfigError
    a key, value or combination that cannot work ├── DataError                  rows that cannot be
    read, rendered or fit ├── ModelError                 a model that cannot be loaded, adapted or
    matched ├── ChainError                 a chain asked to do what its state does not allow ├──
    RunError                   a run directory that is missing, half there, foreign or in the way
    └── TrainingError              training that must not go on
        └── DivergedError          the loss, its gradient or the weights are no longer finite

A message is one line and names the rule, the value ("got …") and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ChainLoRAError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ChainLoRAError):
    """A key, value or combination of values that cannot work."""


class DataError(ChainLoRAError):
    """Rows that cannot be read, rendered, tokenised or fit."""


class ModelError(ChainLoRAError):
    """A model that cannot be loaded, adapted or matched to its fingerprint."""


class ChainError(ChainLoRAError):
    """A chain asked to do what its state does not allow."""


class RunError(ChainLoRAError):
    """A run directory that is missing, half there, foreign or in the way."""


class TrainingError(ChainLoRAError):
    """Training that must not go on."""


class DivergedError(TrainingError):
    """The loss, its gradient or the weights are no longer finite: of a learning rate, a result and
    no accident."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'rank'?)`` or the known words when none is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
