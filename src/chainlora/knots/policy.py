"""Knot policies: what one is told after a step, what it answers, and those that a config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chainlora.config.schema import KnotConfig


@dataclass(frozen=True)
class Position:
    """Where a chain is after a step."""

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
    """Decides after every step inside a link whether a knot is tied.

    A pure function of what it is told. The planned end of a link is a knot without it.
    """

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""


@dataclass(frozen=True)
class SpacedKnots:
    """Tie the same share every so many steps; `every` and `share` are set."""

    knots: KnotConfig

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""
        every, share = self.knots.every, self.knots.share
        assert every is not None
        assert share is not None
        if position.step % every:
            return None
        factor = position.rate if self.knots.follow_rate else 1.0
        return Knot(share * factor, self.knots.moments)


# By the name in `chain.knots.policy`. A factory gets that section, its `every` and `share` set. A
# plug-in adds one of your own (`registry`).
POLICIES: dict[str, Callable[[KnotConfig], KnotPolicy]] = {"spaced": SpacedKnots}
