"""What a config leaves open, as numbers: decided once at the start of a run, and kept with it.

A resumed run takes the numbers that it began with, whatever this version would decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chainlora.config.schema import ChainConfig, KnotConfig

# `knots: auto`: τ = 5·√steps. In benchmarks/lab the best of the time constants tried was 100 to
# 200 for 250 steps, 150 for 1,000, 200 to 600 for 4,000 and 200 for 16,000 (docs/decisions/0029).
# The number of knots in that time is a choice that has not been measured: more cost time, fewer
# are coarser.
_TIME_CONSTANT = 5.0
_KNOTS_PER_TIME_CONSTANT = 12


class Spacing(NamedTuple):
    """Soft knots of a link: steps between them, and the share of the link tied at each."""

    every: int
    share: float


@dataclass(frozen=True)
class Numbers:
    """All that a run decides at its start because its config leaves it open."""

    lengths: tuple[int, ...]  # steps of each link, as planned
    knots: tuple[Spacing, ...] = ()  # of each link, where the config asks for soft knots
    restart_warmup_steps: int | None = None
    select_metric: str | None = None
    path: str | None = None  # how batches run through the model


def spacing(soft: KnotConfig, num_steps: int) -> Spacing:
    """Return the soft knots of a link of `num_steps` steps.

    With the time constant τ and a distance I, the share is 1 − exp(−I/τ).
    """
    tau = soft.time_constant or _TIME_CONSTANT * math.sqrt(num_steps)
    every = soft.every or max(1, round(tau / _KNOTS_PER_TIME_CONSTANT))
    return Spacing(every, soft.share if soft.share is not None else -math.expm1(-every / tau))


def spacings(chain: ChainConfig, lengths: Sequence[int]) -> tuple[Spacing, ...]:
    """Return the soft knots of each link; none where the config asks for none."""
    soft = chain.knots
    return () if soft is None else tuple(spacing(soft, length) for length in lengths)


def break_even(rank: int) -> float:
    """Return the learned tokens a trained parameter below which soft knots were not ahead of LoRA.

    Measured, not derived: benchmarks/lab/README.md, "When to expect anything".
    """
    return 11 * math.sqrt(rank)


def share_of_gap(tokens_a_parameter: float, rank: int) -> float:
    """Return what share of LoRA's gap to four times the rank soft knots closed where rank bound.

    The same lab's rule, right in all studies of it that checked it; below breaking even it is 0.
    """
    return max(0.0, 0.13 * math.log2(tokens_a_parameter / break_even(rank)))


def between(ends: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of links that end after these steps."""
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
