"""Earlier links beside the base, which is neither read nor written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors, stacked
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.holding.base import Holding
from chainlora.chain.holding.tied import Tied
from chainlora.chain.link import Link, stack_links, stacked_rank
from chainlora.chain.low_rank import best_of_rank
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized

# Deposits of the live link are stacked up to this rank, or this many times the link's. Beyond it
# they are compressed to half: they turn slowly, so that little is lost.
_DEPOSIT_RANK = 64
_DEPOSIT_RANKS = 8


class Carried(Holding):
    """Links are stacked into one frozen low-rank branch on the LoRA layers."""

    writes_base = False

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        super().__init__(model, weights)
        self._deposits: dict[str, Factors] = {}
        self._merged: Tied | None = None  # what holds the links of a plain model, after `detach`

    @staticmethod
    def check_config(config: LinkConfig) -> None:
        """Raise ChainError for links that are not a low-rank sum beside the base."""
        if config.init == "pissa":
            raise ChainError(
                "`init: pissa` takes its initialization out of the base (got hold: carried); "
                "use hold: tied"
            )
        if config.dora:
            raise ChainError(
                "`dora` cannot be carried, as its update is no low-rank sum (got hold: carried); "
                "use hold: tied"
            )

    def adopt(self, adapter: Adapter) -> None:
        """Put the branch on."""
        self.modules |= set(adapter.layers)
        self.settle(self.links, adapter)

    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Make the branch hold `links`: of the same links at other strengths, only B changes."""
        self.links, self._deposits = list(links), {}
        if self._merged is not None:
            self._merged.settle(links if adapter is None else [], None)
        if adapter is not None:
            self._merged = None
            adapters.carry(adapter, stack_links(links), stacked_rank(links))

    def take_out(self, start: Mapping[str, Factors], scaling: float) -> None:
        """Do nothing: `check_config` lets no link through that starts from a product."""

    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Stack ``B·A`` on the deposits so far, and bring them into the branch."""
        for name, factors in deposits.items():
            new = Factors(factors.a.float().cpu(), factors.b.float().cpu())
            found = stacked(self._deposits[name], new) if name in self._deposits else new
            if found.a.shape[0] > (room := _room(adapter)):
                found = Factors(*best_of_rank(found.a, found.b, room // 2))
            self._deposits[name] = found
        self._fill_branch(adapter)

    def deposited(self, module: str) -> Tensor | None:
        """Return the product of a module's deposits, or None."""
        found = self._deposits.get(module)
        return None if found is None else found.b @ found.a

    def state(self) -> dict[str, Tensor]:
        """Return the stacked deposits as ``module.A`` and ``module.B``."""
        return {
            f"{name}.{key}": getattr(factors, key.lower())
            for name, factors in self._deposits.items()
            for key in ("A", "B")
        }

    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Continue from stacked deposits."""
        if not state:
            return  # a branch with room for deposits sums in another order
        names = sorted({key.rpartition(".")[0] for key in state})
        for name in names:
            a, b = state.get(f"{name}.A"), state.get(f"{name}.B")
            if name not in self.modules or not _is_pair(a, b, self.base_of(name)):
                raise ChainError(
                    "soft knots must have two factors for each module of this link (got others "
                    f"at {name}); they belong to another link"
                )
        self._deposits = {n: Factors(state[f"{n}.A"], state[f"{n}.B"]) for n in names}
        self._fill_branch(adapter)

    def detach(self) -> None:
        """Leave the links merged into the plain model."""
        merged = Tied(self.model, self.weights)
        merged.modules = set(self.modules)
        for name in self.modules:
            module = self.base_of(name)
            if is_quantized(module):
                raise ChainError(
                    f"detach merges the links (got a quantised {type(module).__name__} at {name}); "
                    "keep the chain on the model, or merge onto the base before quantisation"
                )
            for key, parameter in module.named_parameters(recurse=False):
                self.weights.remember(f"{name}.{key}", parameter)  # untouched until now
        merged.settle(self.links, None)
        self._merged = merged

    def _fill_branch(self, adapter: Adapter) -> None:
        held = stack_links(self.links)
        for name, deposits in self._deposits.items():
            held[name] = stacked(held[name], deposits) if name in held else deposits
        adapters.carry(adapter, held, stacked_rank(self.links) + _room(adapter))


def _room(adapter: Adapter) -> int:
    """Return the largest rank of stacked deposits."""
    return max(_DEPOSIT_RANK, _DEPOSIT_RANKS * adapter.config.rank)


def _is_pair(a: Tensor | None, b: Tensor | None, layer: nn.Module) -> bool:
    """Say whether two tensors are factors of an update of a layer."""
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return False
    return (a.shape[1], b.shape[0]) == adapters.sizes(layer)
