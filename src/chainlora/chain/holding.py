"""Where the earlier links live while the next one is tuned: two ways, one function.

    Tied      in the base weights: ``W_k = cast(W_0 + Σ s·B·A)``. No cost per step.
    Carried   beside an untouched base, stacked as one frozen low-rank branch. For bases that cannot
              be merged, or not without loss.

Both know the same verbs. `settle` makes the model hold given links; `deposit` adds a low-rank share
of the live link (a soft knot); `deposited` reads back what was added since the last `settle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.link import Link, merge_, part_of, stack_links
from chainlora.chain.low_rank import compress_low_rank
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized
from chainlora.models.shards import is_shard

# Deposits of a carried link, stacked: at this rank they are compressed, to half of it or less. The
# deposits of one module turn slowly, so that little is lost; how much, is kept in `branch_error`.
_BRANCH_RANK = 64


class Holding(Protocol):
    """What a chain asks of the place where its earlier links live."""

    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Make the model hold `links`, and nothing else."""

    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to what each module holds."""

    def deposited(self, module: str) -> Tensor | None:
        """Return what was deposited since the last `settle`, dense float32 [out, in], or None."""

    def state(self) -> dict[str, Tensor]:
        """Return the deposits as tensors from which `restore` continues to the same bits."""

    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Continue from `state`, on a model that was settled on the same links."""

    def detach(self, links: Sequence[Link]) -> None:
        """Leave the links merged into the plain model."""


class Tied:
    """Earlier links are merged into the base weights, which change here and nowhere else."""

    def __init__(self, model: nn.Module, weights: BaseWeights, modules: set[str]) -> None:
        self.model, self.weights, self.modules = model, weights, modules
        self._links: list[Link] = []
        self._exact: dict[str, Tensor] = {}  # float32 weights that deposits went into, by module

    @torch.no_grad()
    def settle(
        self,
        links: Sequence[Link],
        adapter: Adapter | None,
        offsets: Mapping[str, tuple[Factors, float]] | None = None,
    ) -> None:
        """Set every module that a link has touched to ``cast(W_0 + Σ s·B·A)``.

        `offsets` are further terms (factors, scaling) by module: a link that starts from others.
        """
        self._links, self._exact = list(links), {}
        for name in sorted(self.modules):
            module = self._module(name)
            weight, bias = self._rebuilt(name, links)
            if offsets and name in offsets:
                factors, scaling = offsets[name]
                merge_(_out_by_in(module, weight), bias, self._part(name, factors), scaling)
            self.weights.write(module.weight, weight)
            if bias is not None:
                self.weights.write(module.bias, bias)

    @torch.no_grad()
    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Add ``B·A`` to the exact float32 weights, each rounded once into the model's dtype."""
        for name, factors in deposits.items():
            module, exact = self._module(name), self._exact_weight(name)
            b, a = factors.b.to(exact.device), factors.a.to(exact.device)
            _out_by_in(module, exact).addmm_(b, a)
            if exact.data_ptr() != module.weight.data_ptr():
                self.weights.write(module.weight, exact)

    def deposited(self, module: str) -> Tensor | None:
        """Return what was deposited since the last `settle`, dense float32 [out, in], or None."""
        if module not in self._exact:
            return None
        weight, _ = self._rebuilt(module, self._links)
        change = self._exact[module].cpu() - weight
        return _out_by_in(self._module(module), change)

    def state(self) -> dict[str, Tensor]:
        """Return the exact float32 weights by module."""
        return {name: exact.detach().cpu() for name, exact in self._exact.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Write the exact weights back."""
        for name, exact in state.items():
            self._exact_weight(name).copy_(exact)
            self.weights.write(self._module(name).weight, self._exact[name])

    def detach(self, links: Sequence[Link]) -> None:
        """Leave the links merged into the plain model."""
        self.settle(links, None)

    def _exact_weight(self, name: str) -> Tensor:
        """Return the float32 weight that deposits go into: the parameter itself if it is one."""
        if name not in self._exact:
            parameter = self._module(name).weight
            if is_shard(parameter):
                raise ChainError(
                    "soft knots tie into whole weights (got a share of one, of the model of "
                    "several processes); use hold: carried"
                )
            is_exact = parameter.dtype == torch.float32
            self._exact[name] = (
                parameter.detach() if is_exact else self._rebuilt(name, self._links)[0]
            )
        return self._exact[name]

    def _rebuilt(self, name: str, links: Sequence[Link]) -> tuple[Tensor, Tensor | None]:
        """Return ``W_0 + Σ s·B·A`` and the bias of a module, float32: the rows that are at hand."""
        module = self._module(name)
        weight, bias = self.weights.read(f"{name}.weight"), None
        if getattr(module, "bias", None) is not None:
            bias = self.weights.read(f"{name}.bias")
        for link in links:
            if name in link.factors:
                part = self._part(name, link.factors[name])
                merge_(_out_by_in(module, weight), bias, part, link.config.scaling)
        return weight, bias

    def _part(self, name: str, factors: Factors) -> Factors:
        """Return what of a link's factors belongs to the rows of a module that are at hand."""
        module, rows = self._module(name), self.weights.rows(f"{name}.weight")
        has_bias = getattr(module, "bias", None) is not None
        bias_rows = self.weights.rows(f"{name}.bias") if has_bias else rows
        return part_of(factors, rows, bias_rows, transposed=adapters.is_transposed(module))

    def _module(self, name: str) -> Any:
        return adapters.base_layer(self.model.get_submodule(name))


class Carried:
    """Earlier links stay beside the base, which is neither read nor written."""

    def __init__(self, model: nn.Module, weights: BaseWeights, modules: set[str]) -> None:
        self.model, self.weights, self.modules = model, weights, modules
        self._links: list[Link] = []
        self._deposits: dict[str, Factors] = {}
        self.branch_error = 0.0  # largest relative error that compressing deposits has made

    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Make the frozen branch hold `links`."""
        self._links, self._deposits = list(links), {}
        if adapter is not None:
            adapters.carry(adapter, stack_links(links))

    def deposit(self, deposits: Mapping[str, Factors], adapter: Adapter) -> None:
        """Stack ``B·A`` on the deposits so far, and bring them into the branch."""
        for name, factors in deposits.items():
            new = Factors(factors.a.float().cpu(), factors.b.float().cpu())
            stacked = _stack(self._deposits.get(name), new)
            if stacked.a.shape[0] > _BRANCH_RANK:
                pair = (stacked.a, stacked.b, 1.0)
                a, b, error = compress_low_rank([pair], rank=_BRANCH_RANK // 2)
                stacked = Factors(a, b)
                self.branch_error = max(self.branch_error, error)
            self._deposits[name] = stacked
        self._fill_branch(adapter)

    def _fill_branch(self, adapter: Adapter) -> None:
        held = stack_links(self._links)
        room = _BRANCH_RANK + max((f.a.shape[0] for f in held.values()), default=0)
        for name, deposits in self._deposits.items():
            held[name] = _stack(held.get(name), deposits)
        adapters.carry(adapter, held, room)

    def deposited(self, module: str) -> Tensor | None:
        """Return what was deposited since the last `settle`, dense float32 [out, in], or None."""
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
        names = [key.removesuffix(".A") for key in state if key.endswith(".A")]
        if not names:
            return  # a branch with room for deposits sums in another order
        self._deposits = {name: Factors(state[f"{name}.A"], state[f"{name}.B"]) for name in names}
        self._fill_branch(adapter)

    def detach(self, links: Sequence[Link]) -> None:
        """Leave the links merged into the plain model."""
        for name in self.modules:
            module = adapters.base_layer(self.model.get_submodule(name))
            if is_quantized(module):
                raise ChainError(
                    f"detach merges the links (got a quantised {type(module).__name__} at {name}); "
                    "keep the chain on the model, or merge onto the base before quantisation"
                )
            for key, parameter in module.named_parameters(recurse=False):
                self.weights.remember(f"{name}.{key}", parameter)  # untouched until now
        Tied(self.model, self.weights, self.modules).settle(links, None)


def _out_by_in(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a view [out, in] of a weight in the module's layout (Conv1D stores in × out)."""
    return weight.T if adapters.is_transposed(module) else weight


def _stack(first: Factors | None, second: Factors) -> Factors:
    """Return factors of the sum of two low-rank products."""
    if first is None:
        return second
    a, b = torch.cat([first.a, second.a]), torch.cat([first.b, second.b], dim=1)
    return Factors(a, b, first.bias)
