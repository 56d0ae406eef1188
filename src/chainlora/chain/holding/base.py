"""What a chain asks of the place where its earlier links live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig


class Holding(ABC):
    """A place for the earlier links of a chain.

    `links` are those that the model holds now, each at its strength; `modules` are the paths of all
    modules that a link has touched.
    """

    writes_base: ClassVar[bool]
    """Whether base weights change: such a model must hold them whole, and in 16 bits or more."""

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        self.model, self.weights = model, weights
        self.links: list[Link] = []
        self.modules: set[str] = set()

    @staticmethod
    @abstractmethod
    def check_config(config: LinkConfig) -> None:
        """Raise ChainError for a link that cannot be tuned on links that are held here."""

    @classmethod
    def check_layers(cls, model: nn.Module, config: LinkConfig) -> None:
        """Raise ModelError if a link adapts layers that cannot hold it."""
        if cls.writes_base:
            adapters.check_mergeable(model, config)

    @abstractmethod
    def adopt(self, adapter: Adapter) -> None:
        """Take in LoRA layers that were just put on the model: hold the same links under them."""

    @abstractmethod
    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Make the model hold `links`, and nothing else."""

    @abstractmethod
    def take_out(self, start: Mapping[str, Factors], scaling: float) -> None:
        """Subtract the product that the live link starts from: the function is unchanged."""

    @abstractmethod
    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to what each module holds (a soft knot)."""

    @abstractmethod
    def deposited(self, module: str) -> Tensor | None:
        """Return what was deposited since the last `settle`, dense float32 [out, in], or None."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the deposits as tensors from which `restore` continues to the same bits."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Continue from `state`, on a model that was settled on the same links.

        Raises ChainError, before anything changes, for the state of another link.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave the links merged into the plain model."""

    def base_of(self, module: str) -> Any:
        """Return the base layer of a module, below its LoRA if it has one."""
        return adapters.base_layer(self.model.get_submodule(module))
