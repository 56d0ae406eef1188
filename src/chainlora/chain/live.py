"""The live link: its counts, the link that it becomes, and its state for an exact resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.holding import Holding
from chainlora.chain.link import Link
from chainlora.chain.low_rank import compress_together, frobenius_norm
from chainlora.errors import ChainError, DivergedError

# Relative error of a stored link with soft knots, whose update sums hundreds of slowly turning
# low-rank deposits. Its effect on the loss is below the resolution of evaluation
# (benchmarks/numerics). Each division by three would need a third more disk.
SOFT_LINK_TOLERANCE = 3e-3

_PARTS = ("A", "B", "bias")  # fields of `Factors`, in their order


@dataclass
class Live:
    """The live link of a chain: its LoRA layers and its counts."""

    adapter: Adapter
    num_steps: int = 0
    num_soft_knots: int = 0


def link_of(live: Live, holding: Holding) -> Link:
    """Return the link that tying would add; the chain sets its index and id.

    Without soft knots the factors are exact copies of the trained ones; with soft knots they are
    the compressed sum of all that the link learned.

    Raises ChainError for a link with soft knots that PEFT merged, DivergedError for one that is not
    finite.
    """
    adapter = live.adapter
    trained = {name: adapters.copied_factors(layer) for name, layer in adapter.layers.items()}
    if not live.num_soft_knots:
        return Link(0, adapter.config, trained, live.num_steps)
    if merged := [name for name, layer in adapter.layers.items() if layer.merged]:
        rule = "a link with soft knots must not be merged into the base"
        remedy = "call unmerge_adapter(), or save before merge_and_unload()"
        raise ChainError(rule, f"a link merged by PEFT at {merged[0]}", remedy)

    def update(name: str) -> Tensor:  # [out, in], without the scaling
        product, tied = trained[name].b @ trained[name].a, holding.deposited(name)
        if tied is not None:
            product.add_(tied, alpha=1 / adapter.config.scaling)
        if not bool(product.isfinite().all()):  # no SVD takes it
            got = f"NaN or infinity in {name} after {live.num_steps} steps"
            remedy = "go back to an earlier state, with a lower learning rate"
            raise DivergedError("weights of a link must be finite", got, remedy)
        return product

    pairs, error = compress_together(update, list(trained), SOFT_LINK_TOLERANCE)
    factors = {name: replace(trained[name], a=a, b=b) for name, (a, b) in pairs.items()}
    return Link(0, adapter.config, factors, live.num_steps, error)


def norm_of(adapter: Adapter) -> float:
    """Return ‖s·B·A‖_F over all modules, computed on the CPU because MPS has no float64."""
    copies = map(adapters.copied_factors, adapter.layers.values())
    norms = [frobenius_norm(factors.a, factors.b) for factors in copies]
    return adapter.config.scaling * math.sqrt(math.fsum(norm**2 for norm in norms))


def state_of(adapter: Adapter, holding: Holding) -> dict[str, Tensor]:
    """Return the state as tensors: ``A/<module>``, ``B/<module>``, ``bias/<module>`` and, with soft
    knots, ``deposit/…``."""
    return _tensors_of(adapter) | {f"deposit/{k}": value for k, value in holding.state().items()}


def load_state(adapter: Adapter, holding: Holding, state: Mapping[str, Tensor]) -> None:
    """Set a live link to a state from `state_of`.

    Raises ChainError, before any change, if tensors are missing, unknown or of another shape.
    """
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in (*_PARTS, "deposit")}
    for key, tensor in state.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    expected = {name: list(tensor.shape) for name, tensor in _tensors_of(adapter).items()}
    shapes = {k: list(v.shape) for k, v in state.items() if not k.startswith("deposit/")}
    for name in sorted(expected.keys() | shapes.keys()):
        found, wanted = shapes.get(name, "nothing"), expected.get(name, "nothing")
        if found != wanted:
            got = f"{found} instead of {wanted} at {name}"
            rule, remedy = "the state of a link must fit its modules", "it belongs to another link"
            raise ChainError(rule, got, remedy)
    holding.restore(parts["deposit"], adapter)
    for name in adapter.layers:
        a, b = parts["A"][name], parts["B"][name]
        adapters.set_factors(adapter, name, Factors(a, b, parts["bias"].get(name)))


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    state = {}
    for name, layer in adapter.layers.items():
        factors = adapters.copied_factors(layer)
        for key, part in zip(_PARTS, (factors.a, factors.b, factors.bias), strict=True):
            if part is not None:
                state[f"{key}/{name}"] = part
    return state
