"""When a knot is tied, and how much of the live link it ties.

The loop asks a policy after every step. It may tie a share of the live link or end the link, early
too: the last link then gets the steps that are left. Whole knots come where links are planned to
end, soft knots at a fixed distance inside them, and with `plateau` a whole knot where a link has
stopped to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chainlora.config.schema import KnotConfig, PlateauConfig, RunConfig
from chainlora.errors import ChainError

# `knots: auto`: τ = 5·√steps. In benchmarks/lab the best of the time constants tried was 100 to
# 200 for 250 steps, 150 for 1,000, 200 to 600 for 4,000 and 200 for 16,000 (docs/decisions/0029).
# The number of knots in that time is a choice that has not been measured: more cost time, fewer
# are coarser.
_TIME_CONSTANT = 5.0
_KNOTS_PER_TIME_CONSTANT = 12


@dataclass(frozen=True)
class Position:
    """Where a run is after a step."""

    link: int
    step: int  # steps of the link that are done
    num_steps: int  # steps planned for the link
    loss: float  # of the step's batch
    rate: float  # the next step's learning rate, as a share of the schedule's highest
    is_last: bool  # whether no link comes after this one
    norm: Callable[[], float]  # ‖s·B·A‖_F over all modules of the live link
    # What a policy notes of a link, saved with every checkpoint; None where that cannot be done.
    memory: dict[str, float] | None = None


@dataclass(frozen=True)
class Knot:
    """Tie `share` of the live link; 1 ends it."""

    share: float
    moments: str = "carried"  # of the optimizer, where the link continues: "carried" or "new"

    @property
    def ends_link(self) -> bool:
        """Say whether nothing of the link is left to continue from."""
        return self.share >= 1


WHOLE = Knot(1.0)


class KnotPolicy(Protocol):
    """Decides after every step whether a knot is tied. A pure function of what it is told."""

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""


@dataclass(frozen=True)
class FixedKnots:
    """Links end where the config says; with `soft`, shares are tied on the way."""

    soft: KnotConfig | None = None

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""
        if position.step >= position.num_steps:
            return WHOLE
        if self.soft is None:
            return None
        every, share = spacing(self.soft, position.num_steps)
        if self.soft.follow_rate:
            share *= position.rate
        return Knot(share, self.soft.moments) if position.step % every == 0 else None


@dataclass(frozen=True)
class PlateauKnots:
    """`otherwise`, but a link also ends when it has stopped to learn; the last one does not.

    Every `patience` steps either ‖B·A‖ is compared with what it was at the last comparison (as
    AROMA does, arXiv 2504.05343), or the mean loss of the steps since with the mean before.
    """

    plateau: PlateauConfig
    otherwise: KnotPolicy

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""
        knot, memory = self.otherwise.knot_after(position), position.memory
        if position.is_last or (knot is not None and knot.ends_link):
            return knot
        if memory is None:
            raise ChainError(
                "knots at a plateau need a run that saves what they compare (got a trainer's); "
                "use `chainlora train`"
            )
        memory["loss"] = memory.get("loss", 0.0) + position.loss
        if position.step % self.plateau.patience:
            return knot
        return WHOLE if self._has_stopped(position, memory) else knot

    def _has_stopped(self, position: Position, memory: dict[str, float]) -> bool:
        """Compare with the last comparison, and note this one."""
        is_norm = self.plateau.of == "norm"
        now = position.norm() if is_norm else memory["loss"] / self.plateau.patience
        before = memory.get("value")
        memory |= {"loss": 0.0, "value": now}
        if before is None:
            return False
        gain = now - before if is_norm else before - now
        return gain < self.plateau.min_change * before


def make_policy(config: RunConfig) -> KnotPolicy:
    """Return the policy that a config asks for."""
    fixed, plateau = FixedKnots(config.chain.knots), config.chain.plateau
    return fixed if plateau is None else PlateauKnots(plateau, fixed)


def spacing(soft: KnotConfig, num_steps: int) -> tuple[int, float]:
    """Return (steps between soft knots, share tied at each) for a link of `num_steps` steps.

    With the time constant τ and a distance I, the share is 1 − exp(−I/τ).
    """
    tau = soft.time_constant or _TIME_CONSTANT * math.sqrt(num_steps)
    every = soft.every or max(1, round(tau / _KNOTS_PER_TIME_CONSTANT))
    share = soft.share if soft.share is not None else -math.expm1(-every / tau)
    return every, share
