"""The base class of fast paths: three methods to install it, and hooks into the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import Patches
from chainlora.engine.probes import UNLIMITED, Facts

PACKED = "packed sequences"  # name of the path that others need

Item = TypeVar("Item")
Result = TypeVar("Result")


class FastPath:
    """A faster way to run a model that computes the same function up to rounding.

    The engine creates one object per class and calls `probe`, then `apply` if the probe returns
    None, and `undo` when it closes. A path that changes the model only through `patches` inherits
    `undo`.

    The other methods replace a step of the plain engine. If they return None, as they do here, the
    engine uses the plain step.
    """

    name: ClassVar[str]  # its name in notes
    needs: ClassVar[str | None] = None  # name of a path that must be in use
    longest_row: int = UNLIMITED  # largest number of tokens to compute at once
    num_threads: int = 1  # in training
    num_scoring_threads: int = 1

    def __init__(self) -> None:
        self.patches = Patches()

    # --- install and remove ---

    def probe(self, model: nn.Module, facts: Facts) -> str | None:
        """Return why this path cannot be used on the model, or None if it is the same function."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Install the path on the model, in place."""

    def undo(self) -> None:
        """Remove the path from the model; safe to call twice."""
        self.patches.restore()

    def note(self, reason: str | None) -> str | None:
        """Return a line for the user: the path is used, or the `reason` why not."""
        return f"{self.name}: {'yes' if reason is None else 'no, ' + reason}"

    # --- steps of the engine ---

    def watched(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the modules whose packed calls `probe` needs (`Facts.calls`)."""
        return ()

    def hidden(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
        """Return the hidden states [R, d] at `batch.rows`, after the final norm."""
        return None

    def adapt(self, layers: Sequence[nn.Module]) -> None:
        """Adapt LoRA layers that were attached to the model."""

    def split(self, examples: Sequence[Example]) -> list[list[int]] | None:
        """Return the shards of a micro-batch, each as the indices of its examples."""
        return None

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, training: bool
    ) -> Iterator[Result] | None:
        """Return ``function(item)`` in the order of the items.

        Each thread has its own gradient and inference mode, so `function` must set them.
        """
        return None
