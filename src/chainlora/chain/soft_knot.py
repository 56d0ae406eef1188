"""The balanced soft knot: tie a share of the live link, and continue from the rest.

With ρ = 1 − share, for each rank-one component i of a module, x = ‖A_i‖ and y = ‖B_i‖:

    tied      W += s·(1−ρ)·B_i·A_i
    rest      A_i ← α·A_i,  B_i ← β·B_i     with α = √(ρ·y/x), β = √(ρ·x/y), so α·β = ρ

The function is unchanged, and both factors of the rest have the same norm √(ρ·x·y). A component
with x = 0 or y = 0 ties nothing and stays as it is.

The gradient of A is proportional to B, and that of B to A. So had the factors been the rest all
along, the gradients would have been β and α times what they were, and Adam's moments are carried
exactly by m_A ← β·m_A, v_A ← β²·v_A, m_B ← α·m_B, v_B ← α²·v_B. (A neighbouring rule with other
scales: ScaLoRA, arXiv 2510.23818.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chainlora.chain.adapters import Adapter, Factors, live_factors
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError


class Balance(NamedTuple):
    """Scales of one module's components [rank] at a soft knot, float32 on the factors' device."""

    a: Tensor  # α: A is multiplied by it, gradients of B with it
    b: Tensor  # β: B is multiplied by it, gradients of A with it
    tied: Tensor  # share of s·B_i·A_i that goes into the base weight


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
    """Leave the rest of a live link on the model, in place; return scales and what is to be tied.

    What is to be tied is ``B·A``, scaling included, by module.
    """
    scales, tied = {}, {}
    for name in adapter.layers:
        a, b = live_factors(adapter, name)
        scales[name] = found = balance(a, b, share)
        tied[name] = Factors(a.detach().clone(), b * (found.tied * adapter.config.scaling))
        a.mul_(found.a.unsqueeze(1))
        b.mul_(found.b)
    return scales, tied


def check_soft_knots(config: LinkConfig) -> None:
    """Raise ChainError for links whose update is not a product that can be shared out."""
    if config.lora_bias or config.init == "pissa":
        raise ChainError(
            "soft knots need plain LoRA links",
            "lora_bias or init: pissa",
            "tie whole links instead",
        )
