"""What a config leaves open, as numbers: decided once at the start of a run, and kept with it.

A resumed run takes the numbers that it began with, whatever this version would decide.
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

# `knots: auto`: τ = 1.4·√(n·m), for a link of n steps that learns as many tokens as it trains
# parameters in m steps (docs/decisions/0029). The number of knots in that time is a choice that has
# not been measured: more cost time, fewer are coarser.
_TIME_CONSTANT = 1.4
_KNOTS_PER_TIME_CONSTANT = 12

# Learned tokens per trained parameter near which soft knots break even with LoRA of the same rank
# (benchmarks/lab/README.md, "When to expect anything"); `knots: auto` turns them off below it. The
# shortest gains of `auto` that were shown have 22 (rank 2), 44 (ranks 1 and 4) and 89 (rank 8).
BREAK_EVEN = 11.0


class Spacing(NamedTuple):
    """Soft knots of a link: steps between them, and the share of the link tied at each."""

    every: int
    share: float


Spacings = tuple[Spacing | None, ...]


@dataclass(frozen=True)
class Numbers:
    """All that a run decides at its start because its config leaves it open."""

    lengths: tuple[int, ...]  # steps of each link, as planned
    knots: Spacings = ()  # of each link, where the config asks for soft knots
    restart_warmup_steps: int | None = None
    select_metric: str | None = None
    path: str | None = None  # how batches run through the model


def spacing(soft: KnotConfig, num_steps: int, learned: float) -> Spacing | None:
    """Return the soft knots of a link of `num_steps` steps; None where `auto` expects nothing.

    With the time constant τ and a distance I, in steps, the share is 1 − exp(−I/τ).

    Args:
        learned: tokens a step, divided by the link's trained parameters.
    """
    if soft == KnotConfig() and num_steps * learned < BREAK_EVEN:
        return None
    tau = soft.time_constant or max(1.0, _TIME_CONSTANT * math.sqrt(num_steps / learned))
    every = soft.every or max(1, round(tau / _KNOTS_PER_TIME_CONSTANT))
    return Spacing(every, soft.share if soft.share is not None else -math.expm1(-every / tau))


def spacings(soft: KnotConfig, lengths: Sequence[int], learned: Sequence[float]) -> Spacings:
    """Return the soft knots of each link."""
    return tuple(spacing(soft, *link) for link in zip(lengths, learned, strict=True))


def asks_for_tokens(soft: KnotConfig) -> bool:
    """Say whether the soft knots of a link depend on the tokens that it learns."""
    return soft.time_constant is None and None in (soft.every, soft.share)


def some_of(rows: Sequence[Row]) -> list[Row]:
    """Return at most 64 rows, evenly spread, whose learned tokens stand for those of all."""
    return [rows[i] for i in range(0, len(rows), math.ceil(len(rows) / 64))]


def say_what_to_expect(soft: KnotConfig, learned: float) -> None:
    """Warn of a first link that learns too few tokens for soft knots to break even."""
    if learned < BREAK_EVEN:
        logger.warning(
            "soft knots break even with plain LoRA near %.0f learned tokens per trained parameter "
            "(got %.1f in the first link)%s; leave soft knots out, or train much longer",
            BREAK_EVEN,
            learned,
            ", so `knots: auto` turns them off" if soft == KnotConfig() else "",
        )


def between(ends: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of links that end after these steps."""
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
