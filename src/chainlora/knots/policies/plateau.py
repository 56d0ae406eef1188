"""Links that end when they have stopped to learn (`chain.plateau`)."""

from __future__ import annotations

from dataclasses import dataclass

from chainlora.config.schema import PlateauConfig
from chainlora.errors import ChainError
from chainlora.knots.policy import WHOLE, Knot, KnotPolicy, Position


@dataclass(frozen=True)
class PlateauKnots:
    """`otherwise`, but a link also ends when it has stopped to learn; the last one does not.

    Every `patience` steps either ‖B·A‖ is compared with what it was at the last comparison (as
    AROMA does, arXiv 2504.05343), or the mean loss of the steps since with the mean before.
    """

    plateau: PlateauConfig
    otherwise: KnotPolicy | None = None

    def knot_after(self, position: Position) -> Knot | None:
        """Return the knot to tie now, or None."""
        knot = self.otherwise.knot_after(position) if self.otherwise else None
        memory = position.memory
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
