"""An optimizer's moments, carried over a soft knot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import Adapter, live_factors
from chainlora.chain.soft_knot import Balance
from chainlora.errors import ChainError, ConfigError

# What optimizers keep of past gradients, by the power of the gradient that it is.
MOMENTS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "variance": 2,
}
# Optimizers whose weight_decay is a part of the gradient, unless it is decoupled.
_DECAYING = (torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
_FACTORED = {"row_var", "col_var"}  # Adafactor's means of squares, over columns and over rows


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer, adapter: Adapter | None, scales: Mapping[str, Balance]
) -> None:
    """Carry an optimizer's moments over a soft knot, in place, exactly.

    Its gradients would have been β times as large for A and α times as large for B (`soft_knot`);
    first moments scale with them, second moments with their square, step counts stay. Raises
    ConfigError for an optimizer whose state is not known to scale, ChainError without a live link.
    """
    if adapter is None:
        raise ChainError("moments are those of a live link", "none", "call it before chain.tie()")
    check_known(optimizer)
    for name, scale in scales.items():
        a, b = live_factors(adapter, name)
        _scale(optimizer.state.get(a, {}), scale.b.unsqueeze(1))
        _scale(optimizer.state.get(b, {}), scale.a)


def check_known(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer with moments that cannot be carried."""
    if unknown := unknown_moments(optimizer):
        raise ConfigError(
            f"carry_moments must know what each moment is (got {', '.join(unknown)}); make a new "
            "optimizer after the soft knot instead"
        )


def unknown_moments(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return what soft knots cannot carry: tensors of a parameter's state of which they know
    nothing, and moments into which weights decay, which do not scale as gradients do."""
    known = MOMENTS.keys() | _FACTORED
    state: Mapping[str, Any] = next(iter(optimizer.state.values()), {})
    tensors = {key for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wraps one
    decays = isinstance(inner, _DECAYING) and any(
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

    The mean of squares along the axis that is scaled is known exactly. The other one mixes what is
    scaled differently; it follows in the mean, so that both still have the same one.
    """
    along, across = ("row_var", "col_var") if scale.dim() == 2 else ("col_var", "row_var")
    before = state[along].mean()
    state[along].mul_(scale**2)
    ratio = state[along].mean() / before
    state[across].mul_(torch.where(before > 0, ratio, 1.0))
