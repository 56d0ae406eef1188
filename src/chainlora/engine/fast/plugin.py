"""What a fast path is: three verbs, and what it may do in place of the plain engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import Patches
from chainlora.engine.probes import UNLIMITED, Facts

PACKED = "packed sequences"  # the path that others build on

Item = TypeVar("Item")
Result = TypeVar("Result")


class FastPath:
    """A faster way to run a model, taken where it computes the same function to rounding.

    An engine makes one of each class, asks `probe`, calls `apply` where nothing speaks against it,
    and `undo` when it is closed. A path changes the model by `patches` alone, so that `undo` need
    not be written again.

    The methods below the verbs stand in for the plain engine; None says that the plain way is to
    be taken. All of them do so here, and a path overrides what it is made for.
    """

    name: ClassVar[str]  # as notes call it
    needs: ClassVar[str | None] = None  # the name of another path; without it this one is not tried
    longest_row: int = UNLIMITED  # most tokens that are to be computed at once
    num_threads: int = 1  # that micro-batches are trained in
    num_scoring_threads: int = 1

    def __init__(self) -> None:
        self.patches = Patches()

    # --- the verbs ---

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why this path would not be the same function, None where it is."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Put the path on the model, in place."""

    def undo(self) -> None:
        """Take it off again; safe to call twice."""
        self.patches.restore()

    def note(self, reason: str | None) -> str | None:
        """Return what a user is told: that the path is taken, or the reason why not."""
        return f"{self.name}: {'yes' if reason is None else 'no, ' + reason}"

    # --- in place of the plain engine ---

    def watched(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the modules whose calls in a packed row `probe` wants to see (`Facts.calls`)."""
        return ()

    def hidden(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
        """Return the hidden states [R, d] at `batch.rows`, after the final norm."""
        return None

    def adapt(self, layers: Sequence[nn.Module]) -> None:
        """Do what is to be done to LoRA layers that were put on the model."""

    def split(self, examples: Sequence[Example]) -> list[list[int]] | None:
        """Return the shards of a micro-batch, each as the indices of its examples."""
        return None

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, training: bool
    ) -> Iterator[Result] | None:
        """Return ``function(item)`` in the order of the items.

        Gradient and inference mode belong to a thread: `function` sets what it needs.
        """
        return None
