"""The link that is being tuned: what is counted of it, and its tensors, which a resume continues
from to the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors, stacked
from chainlora.chain.holding import Holding
from chainlora.chain.link import Link
from chainlora.chain.low_rank import compress_together, frobenius_norm
from chainlora.errors import ChainError

# Relative error to which a link with soft knots is stored. Its update is a sum of hundreds of
# slowly turning low-rank deposits. What it leaves out changes the loss by less than evaluation can
# see (benchmarks/numerics), and each factor of three more would cost a third more of disk.
SOFT_LINK_TOLERANCE = 3e-3

_PARTS = ("A", "B", "bias")  # of a module, in the order of `Factors`


@dataclass
class Live:
    """What is known of the live link beside its LoRA layers on the model, the `adapter`."""

    adapter: Adapter
    start: dict[str, Factors] = field(default_factory=dict, repr=False)  # PiSSA: what it began as
    num_steps: int = 0
    num_soft_knots: int = 0


def link_of(live: Live, holding: Holding) -> Link:
    """Return what tying a live link would add; its place and id are for the chain to say.

    Without soft knots its factors are those on the model, and exact; PiSSA's less those it began
    with.
    """
    adapter = live.adapter
    factors, error = _factors_of(live, adapter, holding)
    return Link(0, adapter.config, factors, live.num_steps, error)


def _factors_of(live: Live, adapter: Adapter, holding: Holding) -> tuple[dict[str, Factors], float]:
    """Return the factors by module, and their relative error."""
    found = {name: adapters.copied_factors(layer) for name, layer in adapter.layers.items()}
    for name, first in live.start.items():
        found[name] = stacked(found[name], replace(first, b=-first.b))
    if not live.num_soft_knots:
        return found, 0.0
    if merged := [name for name, layer in adapter.layers.items() if layer.merged]:
        raise ChainError(
            "a link with soft knots must be beside the base",
            f"one that PEFT has merged into it, at {merged[0]}",
            "call unmerge_adapter(), or save before merge_and_unload()",
        )

    def whole(name: str) -> Tensor:
        product, tied = found[name].b @ found[name].a, holding.deposited(name)
        return product if tied is None else product.add_(tied, alpha=1 / adapter.config.scaling)

    pairs, error = compress_together(whole, list(found), SOFT_LINK_TOLERANCE)
    return {name: replace(found[name], a=a, b=b) for name, (a, b) in pairs.items()}, error


def norm_of(adapter: Adapter) -> float:
    """Return ‖s·B·A‖_F over all modules, computed on the CPU: MPS has no float64."""
    parts = map(adapters.copied_factors, adapter.layers.values())
    norms = [frobenius_norm(part.a, part.b) for part in parts]
    return adapter.config.scaling * math.sqrt(math.fsum(norm**2 for norm in norms))


def state_of(adapter: Adapter, holding: Holding) -> dict[str, Tensor]:
    """Return ``A/<module>``, ``B/<module>``, …, and soft knots' ``deposit/…``."""
    return _tensors_of(adapter) | {f"deposit/{k}": value for k, value in holding.state().items()}


def load_state(adapter: Adapter, holding: Holding, state: Mapping[str, Tensor]) -> None:
    """Set a live link to what `state_of` has returned.

    Raises ChainError, before anything changes, unless every tensor is there, of its shape.
    """
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in (*_PARTS, "deposit")}
    for key, tensor in state.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    wanted = {name: list(tensor.shape) for name, tensor in _tensors_of(adapter).items()}
    found = {k: list(v.shape) for k, v in state.items() if not k.startswith("deposit/")}
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ChainError(
                f"the state of a link must fit its modules (got {found.get(name, 'nothing')} for "
                f"{wanted.get(name, 'nothing')} at {name}); it belongs to another link"
            )
    holding.restore(parts["deposit"], adapter)
    for name in adapter.layers:
        a, b = parts["A"][name], parts["B"][name]
        adapters.set_factors(adapter, name, Factors(a, b, parts["bias"].get(name)))


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    state = {}
    for name, layer in adapter.layers.items():
        factors = adapters.copied_factors(layer)
        parts = (factors.a, factors.b, factors.bias)
        for key, part in zip(_PARTS, parts, strict=True):
            if part is not None:
                state[f"{key}/{name}"] = part
    return state
