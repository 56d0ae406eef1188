"""Where the earlier links live while the next one is tuned. Two ways, one function:

tied      in the base weights: ``W_k = cast(W_0 + Σ c·s·B·A)``. No cost per step.
carried   beside an untouched base, stacked as one frozen low-rank branch. For bases that cannot be
          merged, or not without loss.

Another way is a subclass of `Holding` and a line in `HOLDINGS`.
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
from chainlora.chain.link import Link, merge_, part_of, stack_links, stacked_rank
from chainlora.chain.low_rank import best_of_rank
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError, ModelError
from chainlora.models.quantizing import is_quantized, is_quantized_model
from chainlora.models.shards import is_shard

# Deposits of the live link are stacked up to this rank, or this many times the link's. Beyond it
# they are compressed to half: they turn slowly, so that little is lost.
_DEPOSIT_RANK = 64
_DEPOSIT_RANKS = 8


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
        for name, module in adapters.matched_modules(model, config).items():
            if cls.writes_base and is_quantized(module):
                raise ModelError(
                    f"a quantised layer cannot hold merged links (got {type(module).__name__} at "
                    f"{name}); use hold: carried (with ChainCallback, which has none: `chainlora "
                    "train`, or a base that is not quantised)"
                )

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


class Tied(Holding):
    """Links are merged into the base: every knot rebuilds the weights from the pristine ones.

    Soft knots go into one float32 weight a module, the *exact* one. In a float32 model that is the
    parameter itself; in a narrower one it is a copy, which is cast into the parameter.
    """

    writes_base = True

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        super().__init__(model, weights)
        self._exact: dict[str, Tensor] = {}  # of modules with deposits

    @staticmethod
    def check_config(config: LinkConfig) -> None:
        pass  # all links can be merged

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
    def take_out(self, start: Mapping[str, Factors], scaling: float) -> None:
        for name, factors in start.items():
            weight, bias = self._settled(name)
            self._merge(name, weight, bias, factors, -scaling)
            self._write(name, weight, bias)

    @torch.no_grad()
    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to the exact weights, each rounded once into the model's dtype."""
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
                raise ChainError(
                    "soft knots must have the weights of this link's modules (got "
                    f"{list(exact.shape)} for {name}); they belong to another link"
                )
        for name, exact in state.items():
            self._exact_weight(name).copy_(exact)
            self._show(name)

    def detach(self) -> None:
        self.settle(self.links, None)

    def _exact_weight(self, name: str) -> Tensor:
        """Return the exact weight of a module, which begins as the one that was settled."""
        if name not in self._exact:
            parameter = self.base_of(name).weight
            if is_shard(parameter):
                raise ChainError(
                    "soft knots tie into whole weights (got a share of one, of the model of "
                    "several processes); use hold: carried"
                )
            is_copy = parameter.dtype != torch.float32
            self._exact[name] = self._settled(name)[0] if is_copy else parameter.detach()
        return self._exact[name]

    def _show(self, name: str) -> None:
        """Round an exact weight into the parameter, unless it is the parameter.

        It no longer is after a move to another device or dtype, and in a copy of the chain.
        """
        parameter, exact = self.base_of(name).weight, self._exact[name]
        if exact.data_ptr() == parameter.data_ptr():
            return
        self.weights.write(parameter, exact)
        if parameter.dtype == torch.float32:
            self._exact[name] = parameter.detach()

    def _settled(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return ``W_0 + Σ c·s·B·A`` and the bias of a module, wide: the rows at hand."""
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
        """Add ``s·B·A`` to a module's weight, in place: of a shard, the rows that are at hand."""
        rows = self.weights.rows(f"{name}.weight")
        bias_rows = rows if bias is None else self.weights.rows(f"{name}.bias")
        transposed = adapters.is_transposed(self.base_of(name))
        part = part_of(factors, rows, bias_rows, transposed=transposed)
        merge_(self._out_by_in(name, weight), bias, part, scaling)

    def _write(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        module = self.base_of(name)
        self.weights.write(module.weight, weight)
        if bias is not None:
            self.weights.write(module.bias, bias)

    def _out_by_in(self, name: str, weight: Tensor) -> Tensor:
        """Return a view [out, in] of a weight in its module's layout (Conv1D stores in × out)."""
        return weight.T if adapters.is_transposed(self.base_of(name)) else weight


class Carried(Holding):
    """Links are stacked into one frozen low-rank branch on the LoRA layers."""

    writes_base = False

    def __init__(self, model: nn.Module, weights: BaseWeights) -> None:
        super().__init__(model, weights)
        self._deposits: dict[str, Factors] = {}
        self._merged: Tied | None = None  # what holds the links of a plain model, after `detach`

    @staticmethod
    def check_config(config: LinkConfig) -> None:
        if config.init == "pissa":
            raise ChainError(
                "`init: pissa` takes its initialization out of the base (got hold: carried); "
                "use hold: tied"
            )

    def adopt(self, adapter: Adapter) -> None:
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
        pass  # no link that starts from a product passes `check_config`

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
        found = self._deposits.get(module)
        return None if found is None else found.b @ found.a

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": getattr(factors, key.lower())
            for name, factors in self._deposits.items()
            for key in ("A", "B")
        }

    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
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


HOLDINGS: dict[str, type[Holding]] = {"tied": Tied, "carried": Carried}


def holding_named(name: str) -> type[Holding]:
    """Return the holding of a name. Raises ChainError for another name."""
    if name not in HOLDINGS:
        known = " or ".join(HOLDINGS)
        raise ChainError(f"`hold` must be {known} (got {name!r:.60}); leave it out for tied")
    return HOLDINGS[name]


def hold_for(model: nn.Module) -> str:
    """Return the name of the holding that suits a model: merged where nothing is lost by it."""
    return "carried" if is_quantized_model(model) else "tied"
