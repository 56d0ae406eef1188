"""Carry an optimizer's moments over a soft knot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import Adapter, live_factors
from chainlora.chain.soft_knot import Balance
from chainlora.errors import ChainError, ConfigError

# Moments of past gradients in the state of optimizers, with the power of the gradient they sum.
MOMENTS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "variance": 2,
}
# Optimizers that add weight_decay to the gradient, unless it is decoupled.
_COUPLED_DECAY = (torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
_FACTORED = {"row_var", "col_var"}  # Adafactor: means of squares over columns, and over rows


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer, adapter: Adapter | None, scales: Mapping[str, Balance]
) -> None:
    """Rescale an optimizer's moments after a soft knot, in place; exact for AdamW, SGD and others.

    With the new factors, past gradients would have been β times as large for A and α times as large
    for B (`chain.soft_knot`). First moments scale with them, second moments with their squares;
    step counts do not change.

    Args:
        optimizer: the optimizer of the live link.
        adapter: `Chain.live`.
        scales: the result of `Chain.tie_share`.

    Raises:
        ConfigError: the state contains moments that cannot be rescaled.
        ChainError: there is no live link.
    """
    if adapter is None:
        raise ChainError("carry_moments needs a live link", "none", "call it before chain.tie()")
    check_known(optimizer)
    for name, scale in scales.items():
        a, b = live_factors(adapter, name)
        _scale(optimizer.state.get(a, {}), scale.b.unsqueeze(1))
        _scale(optimizer.state.get(b, {}), scale.a)


def check_known(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError if the optimizer has moments that cannot be carried."""
    if unknown := unknown_moments(optimizer):
        raise ConfigError(
            f"carry_moments does not support this optimizer state (got {', '.join(unknown)}); "
            "make a new optimizer after the soft knot instead"
        )


def unknown_moments(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parts of an optimizer's state that cannot be carried.

    These are unknown tensors, and moments that contain weight decay: they do not scale as
    gradients do.
    """
    known = MOMENTS.keys() | _FACTORED
    state: Mapping[str, Any] = next(iter(optimizer.state.values()), {})
    tensors = {key for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps optimizers
    decays = isinstance(inner, _COUPLED_DECAY) and any(
        group["weight_decay"]
        and group.get("momentum", True)
        and not group.get("decoupled_weight_decay")
        for group in inner.param_groups
    )
    return sorted(tensors - known) + ["weight_decay in the moments"] * decays


def _scale(state: Mapping[str, Any], scale: Tensor) -> None:
    for key, power in MOMENTS.items():
        if key in state:
            state[key].mul_(scale**power)
    if state.keys() >= _FACTORED:
        _scale_factored(state, scale)


def _scale_factored(state: Mapping[str, Any], scale: Tensor) -> None:
    """Scale Adafactor's estimate ``V = R·C / mean(R)`` of the second moments by ``scale²``.

    The vector along the scaled axis is exact. The other one averages over components with
    different scales: it is scaled as a whole, so that both vectors keep equal means.
    """
    along, across = ("row_var", "col_var") if scale.dim() == 2 else ("col_var", "row_var")
    before = state[along].mean()
    state[along].mul_(scale**2)
    ratio = state[along].mean() / before
    state[across].mul_(torch.where(before > 0, ratio, 1.0))
