"""Earlier links in the base weights, which change here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.holding.base import Holding
from chainlora.chain.link import Link, merge_, part_of
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.models.shards import is_shard


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
        """Let any link through: all of them can be merged."""

    def adopt(self, adapter: Adapter) -> None:
        """Remember the weights that links will be merged into."""
        self.modules |= set(adapter.layers)
        for path, parameter in adapters.base_parameters(adapter):
            self.weights.remember(path, parameter)

    @torch.no_grad()
    def settle(self, links: Sequence[Link], adapter: Adapter | None) -> None:
        """Set every module that a link has touched to ``cast(W_0 + Σ c·s·B·A)``."""
        self.links, self._exact = list(links), {}
        for name in sorted(self.modules):
            self._write(name, *self._settled(name))

    @torch.no_grad()
    def take_out(self, start: Mapping[str, Factors], scaling: float) -> None:
        """Set the modules of the live link to ``cast(W_k − s·B₀·A₀)``."""
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
        """Return the exact weight less the one that was settled, [out, in], or None."""
        if module not in self._exact:
            return None
        settled, _ = self._settled(module)
        return self._out_by_in(module, self._exact[module].cpu() - settled)

    def state(self) -> dict[str, Tensor]:
        """Return the exact weights by module."""
        return {name: exact.to("cpu", copy=True) for name, exact in self._exact.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Write exact weights back."""
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
        """Leave the links merged into the plain model."""
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
        if self._has_bias(name):
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
        bias_rows = self.weights.rows(f"{name}.bias") if self._has_bias(name) else rows
        transposed = adapters.is_transposed(self.base_of(name))
        part = part_of(factors, rows, bias_rows, transposed=transposed)
        merge_(self._out_by_in(name, weight), bias, part, scaling)

    def _write(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        module = self.base_of(name)
        self.weights.write(module.weight, weight)
        if bias is not None:
            self.weights.write(module.bias, bias)

    def _has_bias(self, name: str) -> bool:
        return getattr(self.base_of(name), "bias", None) is not None

    def _out_by_in(self, name: str, weight: Tensor) -> Tensor:
        """Return a view [out, in] of a weight in its module's layout (Conv1D stores in × out)."""
        return weight.T if adapters.is_transposed(self.base_of(name)) else weight
