"""Open values of a config, decided once at the start of a run and stored with it.

A resumed run uses its stored values, even if this version would decide otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from chainlora.config.schema import KnotConfig

logger = logging.getLogger(__name__)
Row = TypeVar("Row")

# `knots: auto`: τ = 1.4·√(n·m) for a link of n steps; in m steps it learns as many tokens as it has
# trained parameters (docs/decisions/0029). The number of knots per τ was chosen without a
# measurement: more knots cost time, fewer are coarser.
_TIME_CONSTANT = 1.4
_KNOTS_PER_TIME_CONSTANT = 12

# Near this number of learned tokens per trained parameter, soft knots break even with LoRA of the
# same rank (benchmarks/lab/README.md, "When to expect anything"). Below it `knots: auto` turns them
# off. The smallest numbers with a measured gain are 22 (rank 2), 44 (ranks 1 and 4), 89 (rank 8).
BREAK_EVEN = 11.0


class Spacing(NamedTuple):
    """Soft knots of a link: steps between them, and the share that each one ties."""

    every: int
    share: float


Spacings = tuple[Spacing | None, ...]


@dataclass(frozen=True)
class Numbers:
    """Values that a run decides at its start because its config leaves them open."""

    lengths: tuple[int, ...]  # planned steps of each link
    knots: Spacings = ()  # per link, if the config asks for soft knots
    restart_warmup_steps: int | None = None
    select_metric: str | None = None
    path: str | None = None  # how batches run through the model


def spacing(soft: KnotConfig, num_steps: int, learned: float) -> Spacing | None:
    """Return the soft knots of a link of `num_steps`; None if `knots: auto` turns them off.

    With a time constant τ and a distance I, in steps, the share is 1 − exp(−I/τ). `learned` are the
    learned tokens per step and trained parameter of the link.
    """
    if soft == KnotConfig() and num_steps * learned < BREAK_EVEN:
        return None
    tau = soft.time_constant or max(1.0, _TIME_CONSTANT * math.sqrt(num_steps / learned))
    every = soft.every or max(1, round(tau / _KNOTS_PER_TIME_CONSTANT))
    return Spacing(every, soft.share if soft.share is not None else -math.expm1(-every / tau))


def spacings(soft: KnotConfig, lengths: Sequence[int], learned: Sequence[float]) -> Spacings:
    """Return the soft knots of each link; warn if they do not break even in the first link."""
    first = lengths[0] * learned[0]  # NaN if the knots do not depend on it
    if first < BREAK_EVEN:
        logger.warning(
            "soft knots break even with plain LoRA near %.0f learned tokens per trained parameter "
            "(got %.1f in the first link)%s; leave soft knots out, or train much longer",
            BREAK_EVEN,
            first,
            ", so `knots: auto` turns them off" if soft == KnotConfig() else "",
        )
    pairs = zip(lengths, learned, strict=True)
    found = tuple(spacing(soft, num_steps, tokens) for num_steps, tokens in pairs)
    distances = [each.every for each in found if each is not None]
    if soft.policy == "spaced" and distances and min(distances) >= max(lengths):
        logger.warning(
            "no soft knot comes: they are %d steps apart, and the longest link has %d; lower "
            "knots.every, or leave soft knots out",
            *(min(distances), max(lengths)),
        )
    return found


def asks_for_tokens(soft: KnotConfig) -> bool:
    """Return whether the soft knots of a link depend on its number of learned tokens."""
    return soft.time_constant is None and None in (soft.every, soft.share)


def some_of(rows: Sequence[Row]) -> list[Row]:
    """Return at most 64 evenly spaced rows, to estimate the learned tokens of all rows."""
    return [rows[i] for i in range(0, len(rows), math.ceil(len(rows) / 64))]


def between(ends: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of links that end after these steps."""
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
