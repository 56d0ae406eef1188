"""Soft knots at a fixed distance."""

from __future__ import annotations

from dataclasses import dataclass

from chainlora.config.schema import KnotConfig
from chainlora.knots.policy import Knot, Position


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


POLICIES = {"spaced": SpacedKnots}
