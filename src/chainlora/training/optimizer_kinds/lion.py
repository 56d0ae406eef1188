"""Lion (arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

import torch

from chainlora.config.schema import TrainConfig
from chainlora.training.optimizer_kinds import Groups


def lion(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Lion. Its betas are its own, (0.9, 0.99), unless options say otherwise."""
    keys: dict[str, Any] = {"weight_decay": config.weight_decay}
    return Lion(groups, config.lr, **keys | config.optimizer_options)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated first moment (arXiv 2302.06675)."""

    def __init__(
        self,
        groups: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        fast, slow = betas
        if not (0 <= fast < 1 and 0 <= slow < 1):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                moment = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, moment, fast).sign_(), alpha=group["lr"])
                moment.lerp_(p.grad, 1 - slow)


OPTIMIZERS = {"lion": lion}
