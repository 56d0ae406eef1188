"""The live link as tensors, from which it continues to the same bits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.errors import ChainError


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Return factors and extra modules as ``A/<module>``, ``B/<module>``, …, ``extra/<path>``."""
    state: dict[str, Tensor] = {}
    for name in adapter.layers:
        factors = adapters.get_factors(adapter, name)
        parts = {"A": factors.a, "B": factors.b, "bias": factors.bias}
        parts["magnitude"] = factors.magnitude
        state |= {f"{key}/{name}": part for key, part in parts.items() if part is not None}
    return state | {f"extra/{path}": w for path, w in adapters.get_extra(adapter).items()}


def load_tensors(model: nn.Module, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Set factors and extra modules to what `tensors_of` has returned."""
    parts = {key: section(state, key) for key in ("A", "B", "bias", "magnitude", "extra")}
    missing = set(adapter.layers) - (set(parts["A"]) & set(parts["B"]))
    if missing:
        raise ChainError(
            "the state of a link must have factors for every adapted module (got none for "
            f"{min(missing)}); it belongs to another link"
        )
    for name in adapter.layers:
        a, b = parts["A"][name], parts["B"][name]
        factors = Factors(a, b, parts["bias"].get(name), parts["magnitude"].get(name))
        adapters.set_factors(adapter, name, factors)
    adapters.set_extra(model, adapter, parts["extra"])


def section(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors under ``<name>/``, by the rest of their names."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
