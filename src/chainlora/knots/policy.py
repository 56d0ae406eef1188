"""Knot policies: their interface, the built-in policy, and the table of names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chainlora.config.schema import KnotConfig


@dataclass(frozen=True)
class Position:
    """The state of a chain after a step, for a knot policy."""

    link: int  # index among the planned links
    step: int  # finished steps of the link
    num_steps: int  # steps planned for the link
    loss: float  # of the step's batch
    rate: float  # learning rate of the next step, as a fraction of the schedule's highest rate
    is_last: bool  # whether this is the last planned link
    norm: Callable[[], float]  # ‖s·B·A‖_F over all modules of the live link
    # the policy's notes on the link, saved with every checkpoint; None if the loop cannot save them
    memory: dict[str, float] | None = None


@dataclass(frozen=True)
class Knot:
    """Tie `share` of the live link; 1 ends it."""

    share: float
    moments: str = "carried"  # of the optimizer if the link continues: "carried" or "new"

    @property
    def ends_link(self) -> bool:
        """Whether this knot ties the whole link."""
        return self.share >= 1


WHOLE = Knot(1.0)


class KnotPolicy(Protocol):
    """Decides after every step of a link whether to tie a knot.

    Must be a pure function of `position`. It is not asked at the planned end of a link, which is
    always a knot.
    """

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""


@dataclass(frozen=True)
class SpacedKnots:
    """Ties the same share at a fixed distance; the config must set `every` and `share`."""

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


# Factories by the name in `chain.knots.policy`. A factory gets that section, with `every` and
# `share` set. Plug-ins can add entries (`registry`).
POLICIES: dict[str, Callable[[KnotConfig], KnotPolicy]] = {"spaced": SpacedKnots}
