"""Storage of earlier links while the next link is tuned. Both kinds give the same function:

tied      in the base weights: ``W_k = cast(W_0 + Σ c·s·B·A)``. No cost per step.
carried   in one frozen low-rank branch beside an untouched base. For bases that cannot be merged
          into, or only with a loss (quantised).

To add a kind, write a subclass of `Holding` and an entry in `HOLDINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors, stacked
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.link import Link, stack_links, stacked_rank
from chainlora.chain.low_rank import best_of_rank
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError, ModelError
from chainlora.models.quantizing import is_quantized, is_quantized_model
from chainlora.models.shards import is_shard

# Deposits of the live link are stacked up to a limit, then compressed to half of it: the larger of
# this rank and this multiple of the link's rank. Directions turn slowly, so little is lost.
_DEPOSIT_RANK = 64
_DEPOSIT_MULTIPLE = 8


class Holding(ABC):
    """Storage of the earlier links of a chain.

    Args:
        model: the model of the chain.
        weights: its pristine base weights.

    Attributes:
        links: the links that the model contains now, each at its strength.
        modules: paths of all modules that a link has adapted.
    """

    writes_base: ClassVar[bool]
    """Whether base weights change. Then adapted layers must be stored in 16 bits or more."""

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        self.model, self.weights = model, weights
        self.links: list[Link] = []
        self.modules: set[str] = set()

    @classmethod
    def check_layers(cls, model: nn.Module, config: LinkConfig) -> None:
        """Raise ModelError if a link adapts layers that cannot store it."""
        for name, module in adapters.matched_modules(model, config).items():
            if cls.writes_base and is_quantized(module):
                raise ModelError(
                    "a quantised layer cannot hold merged links",
                    f"{type(module).__name__} at {name}",
                    "use hold: carried. ChainCallback has no `hold`: use `chainlora train`, or a "
                    "base that is not quantised",
                )

    @abstractmethod
    def adopt(self, adapter: Adapter) -> None:
        """Register LoRA layers that were just attached; the model keeps the same links."""

    @abstractmethod
    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Make the model contain exactly `links`; deposits are removed."""

    @abstractmethod
    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to the stored links of each module (a soft knot)."""

    @abstractmethod
    def deposited(self, module: str) -> Tensor | None:
        """Return the sum of deposits since the last `settle`, float32 [out, in], or None."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the deposits as tensors, for `restore`."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Set the deposits, bit for bit, on a model that contains the same links.

        Raises ChainError, before any change, if the state belongs to another link.
        """

    @abstractmethod
    def detach(self) -> None:
        """Merge the links into the plain model."""

    def base_of(self, module: str) -> Any:
        """Return the base layer of a module, without its LoRA."""
        return adapters.base_layer(self.model.get_submodule(module))


class Tied(Holding):
    """Merges links into the base weights; every knot rebuilds them from the pristine weights.

    Soft knots add to one float32 weight per module, the *exact* weight. In a float32 model it is
    the parameter itself; otherwise it is a copy that is cast into the parameter.
    """

    writes_base = True

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        super().__init__(model, weights)
        self._exact: dict[str, Tensor] = {}  # by module with deposits

    def adopt(self, adapter: Adapter) -> None:
        self.modules |= set(adapter.layers)
        for name in adapter.layers:
            for key in ("weight", "bias"):
                if isinstance(parameter := getattr(self.base_of(name), key, None), Tensor):
                    self.weights.remember(f"{name}.{key}", parameter)

    @torch.no_grad()
    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        self.links, self._exact = list(links), {}
        for name in sorted(self.modules):
            self._write(name, *self._settled(name))

    @torch.no_grad()
    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to the exact weights and cast each one into the model's dtype."""
        for name, factors in deposits.items():
            exact = self._exact_weight(name)
            self._out_by_in(name, exact).addmm_(factors.b.to(exact), factors.a.to(exact))
            self._show(name)

    def deposited(self, module: str) -> Tensor | None:
        if module not in self._exact:
            return None
        settled, _ = self._settled(module)
        return self._out_by_in(module, self._exact[module].cpu() - settled)

    def state(self) -> dict[str, Tensor]:
        return {name: exact.to("cpu", copy=True) for name, exact in self._exact.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        for name, exact in state.items():
            if name not in self.modules or exact.shape != self.base_of(name).weight.shape:
                rule = "the weights of soft knots must fit the modules of this link"
                got = f"{list(exact.shape)} for {name}"
                raise ChainError(rule, got, "they belong to another link")
        for name, exact in state.items():
            self._exact_weight(name).copy_(exact)
            self._show(name)

    def detach(self) -> None:
        self.settle(self.links, None)

    def _exact_weight(self, name: str) -> Tensor:
        """Return the exact weight of a module, created from its settled weight if needed."""
        if name not in self._exact:
            parameter = self.base_of(name).weight
            if is_shard(parameter):
                got = "a weight that several processes share"
                raise ChainError("soft knots need unsharded weights", got, "use hold: carried")
            is_copy = parameter.dtype != torch.float32
            self._exact[name] = self._settled(name)[0] if is_copy else parameter.detach()
        return self._exact[name]

    def _show(self, name: str) -> None:
        """Cast an exact weight into the parameter, unless both are the same tensor.

        They differ after a move to another device or dtype, and in a copy of the chain.
        """
        parameter, exact = self.base_of(name).weight, self._exact[name]
        if exact.data_ptr() == parameter.data_ptr():
            return
        self.weights.write(parameter, exact)
        if parameter.dtype == torch.float32:
            self._exact[name] = parameter.detach()

    def _settled(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return ``W_0 + Σ c·s·B·A`` and the bias of a module, float32, rows of this process."""
        weight, bias = self.weights.read(f"{name}.weight"), None
        if getattr(self.base_of(name), "bias", None) is not None:
            bias = self.weights.read(f"{name}.bias")
        for link in self.links:
            if link.strength and name in link.factors:
                self._merge(name, weight, bias, link.factors[name], link.scaling)
        return weight, bias

    def _merge(
        self, name: str, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float
    ) -> None:
        """Add ``s·B·A`` to a module's weight, in place; to a shard only its own rows."""
        a, b, rows = factors.a, factors.b, self.weights.rows(f"{name}.weight")
        if adapters.is_transposed(self.base_of(name)):  # [in, out]: rows are columns of A
            a = a[:, rows]
        else:
            b = b[rows]
        self._out_by_in(name, weight).addmm_(b.to(weight), a.to(weight), alpha=scaling)
        if factors.bias is not None and bias is not None:
            part = factors.bias[self.weights.rows(f"{name}.bias")]
            bias.add_(part.to(weight), alpha=scaling)

    def _write(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        module = self.base_of(name)
        self.weights.write(module.weight, weight)
        if bias is not None:
            self.weights.write(module.bias, bias)

    def _out_by_in(self, name: str, weight: Tensor) -> Tensor:
        """Return a view [out, in] of a weight in its module's layout (Conv1D: [in, out])."""
        return weight.T if adapters.is_transposed(self.base_of(name)) else weight


class Carried(Holding):
    """Stacks links into one frozen low-rank branch on the LoRA layers."""

    writes_base = False

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        super().__init__(model, weights)
        self._deposits: dict[str, Factors] = {}
        self._merged: Tied | None = None  # holds the links after `detach`

    def adopt(self, adapter: Adapter) -> None:
        self.modules |= set(adapter.layers)
        self.settle(self.links, adapter)

    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Fill the branch with `links`; if only strengths differ, only B changes."""
        self.links, self._deposits = list(links), {}
        if self._merged is not None:
            self._merged.settle(links if adapter is None else [], None)
        if adapter is not None:
            self._merged = None
            adapters.carry(adapter, stack_links(links), stacked_rank(links))

    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Stack ``B·A`` on the earlier deposits and refill the branch."""
        for name, factors in deposits.items():
            new = Factors(factors.a.float().cpu(), factors.b.float().cpu())
            total = stacked(self._deposits[name], new) if name in self._deposits else new
            if total.a.shape[0] > (limit := _deposit_limit(adapter)):
                total = Factors(*best_of_rank(total.a, total.b, limit // 2))
            self._deposits[name] = total
        self._fill_branch(adapter)

    def deposited(self, module: str) -> Tensor | None:
        factors = self._deposits.get(module)
        return None if factors is None else factors.b @ factors.a

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": getattr(factors, key.lower())
            for name, factors in self._deposits.items()
            for key in ("A", "B")
        }

    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        if not state:
            return  # a branch padded for deposits would sum in another order: other bits
        names = sorted({key.rpartition(".")[0] for key in state})
        for name in names:
            a, b = state.get(f"{name}.A"), state.get(f"{name}.B")
            if name not in self.modules or not _is_pair(a, b, self.base_of(name)):
                rule = "soft knots must have two factors that fit each module of this link"
                raise ChainError(rule, f"others at {name}", "they belong to another link")
        self._deposits = {n: Factors(state[f"{n}.A"], state[f"{n}.B"]) for n in names}
        self._fill_branch(adapter)

    def detach(self) -> None:
        merged = Tied(self.model, self.weights)
        merged.modules = set(self.modules)
        for name in self.modules:
            module = self.base_of(name)
            if is_quantized(module):
                got = f"a quantised {type(module).__name__} at {name}"
                remedy = "keep the chain on the model, or merge onto the base before quantisation"
                raise ChainError("detach merges the links", got, remedy)
            for key, parameter in module.named_parameters(recurse=False):
                self.weights.remember(f"{name}.{key}", parameter)  # still pristine
        merged.settle(self.links, None)
        self._merged = merged

    def _fill_branch(self, adapter: Adapter) -> None:
        branch = stack_links(self.links)
        for name, deposits in self._deposits.items():
            branch[name] = stacked(branch[name], deposits) if name in branch else deposits
        adapters.carry(adapter, branch, stacked_rank(self.links) + _deposit_limit(adapter))


def _deposit_limit(adapter: Adapter) -> int:
    """Return the largest rank of stacked deposits."""
    return max(_DEPOSIT_RANK, _DEPOSIT_MULTIPLE * adapter.config.rank)


def _is_pair(a: Tensor | None, b: Tensor | None, layer: nn.Module) -> bool:
    """Return whether two tensors are factors A and B of an update of a layer."""
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return False
    return (a.shape[1], b.shape[0]) == adapters.sizes(layer)


HOLDINGS: dict[str, type[Holding]] = {"tied": Tied, "carried": Carried}


def holding_named(name: str) -> type[Holding]:
    """Return a holding by name. Raises ChainError for an unknown name."""
    if name not in HOLDINGS:
        rule = f"`hold` must be {' or '.join(HOLDINGS)}"
        raise ChainError(rule, f"{name!r:.60}", "leave it out for tied")
    return HOLDINGS[name]


def hold_for(model: nn.Module) -> str:
    """Return the name of the holding for a model: tied unless merging would lose precision."""
    return "carried" if is_quantized_model(model) else "tied"
