"""The balanced soft knot: tie a share of the live link and continue from the rest.

With ρ = 1 − share, for each rank-one component i of a module, x = ‖A_i‖ and y = ‖B_i‖:

    tied      W += s·(1−ρ)·B_i·A_i
    rest      A_i ← α·A_i,  B_i ← β·B_i     with α = √(ρ·y/x), β = √(ρ·x/y), so α·β = ρ

The model's function stays the same, and both factors of the rest get the norm √(ρ·x·y). A component
with x = 0 or y = 0 stays as it is and ties nothing.

The gradient of A is proportional to B, and the gradient of B is proportional to A. So with the new
factors, past gradients of A would have been β times as large, and those of B α times as large. That
gives Adam's moments exactly: m_A ← β·m_A, v_A ← β²·v_A, m_B ← α·m_B, v_B ← α²·v_B. ScaLoRA (arXiv
2510.23818) has a similar rule with other scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chainlora.chain.adapters import Adapter, Factors, live_factors
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError


class Balance(NamedTuple):
    """Scales of a module's rank-one components at a soft knot, each [rank], float32."""

    a: Tensor  # α, multiplies A and the gradient of B
    b: Tensor  # β, multiplies B and the gradient of A
    tied: Tensor  # share of s·B_i·A_i that is added to the base weight: 1 − ρ, or 0


def balance(a: Tensor, b: Tensor, share: float) -> Balance:
    """Return the scales of a soft knot that ties `share` of A [rank, in] and B [out, rank]."""
    rest = 1.0 - share
    x = torch.linalg.vector_norm(a.detach(), dim=1, dtype=torch.float32)
    y = torch.linalg.vector_norm(b.detach(), dim=0, dtype=torch.float32)
    alive = (x > 0) & (y > 0)
    ratio = torch.where(alive, y, 1.0) / torch.where(alive, x, 1.0)
    alpha = torch.where(alive, (rest * ratio).sqrt(), 1.0)
    beta = torch.where(alive, (rest / ratio).sqrt(), 1.0)
    return Balance(alpha, beta, torch.where(alive, share, 0.0))


@torch.no_grad()
def share_out(adapter: Adapter, share: float) -> tuple[dict[str, Balance], dict[str, Factors]]:
    """Scale the live link to its rest, in place, and return the tied share.

    Returns:
        The scales by module, and by module the factors A [rank, in] and B [out, rank] of the tied
        share ``B·A``; B contains the scaling.
    """
    scales, tied = {}, {}
    for name in adapter.layers:
        a, b = live_factors(adapter, name)
        scales[name] = scale = balance(a, b, share)
        tied[name] = Factors(a.detach().clone(), b * (scale.tied * adapter.config.scaling))
        a.mul_(scale.a.unsqueeze(1))
        b.mul_(scale.b)
    return scales, tied


def check_soft_knots(config: LinkConfig) -> None:
    """Raise ChainError for links that soft knots cannot divide: with a bias."""
    if config.lora_bias:
        raise ChainError("soft knots need plain LoRA links", "lora_bias", "tie whole links instead")
