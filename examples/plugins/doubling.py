"""Soft knots at doubling distances: a knot policy as a plug-in."""

from dataclasses import dataclass

from chainlora.config.schema import KnotConfig
from chainlora.knots.policy import POLICIES, Knot, Position


@dataclass(frozen=True)
class DoublingKnots:
    """Tie a share after 4, 8, 16, … steps of a link (distances as in LoQT, arXiv 2405.16528)."""

    knots: KnotConfig

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""
        multiple, rest = divmod(position.step, self.knots.every)
        is_due = rest == 0 and multiple.bit_count() == 1
        return Knot(self.knots.share, self.knots.moments) if is_due else None


POLICIES["doubling"] = DoublingKnots
