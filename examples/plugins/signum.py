"""Signum: an optimizer as a plug-in."""

import torch

from chainlora.config.schema import TrainConfig
from chainlora.knots.moments import MOMENTS
from chainlora.training.optimizers import OPTIMIZERS, Groups


class Signum(torch.optim.Optimizer):
    """The sign of the momentum (arXiv 1802.04434)."""

    def __init__(self, groups: Groups, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Make one step."""
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(moment.sign(), alpha=group["lr"])


def signum(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Make it; `train.optimizer_options` overrides what other keys say."""
    keys = {"momentum": 0.9, "weight_decay": config.weight_decay} | config.optimizer_options
    return Signum(groups, config.lr, **keys)


OPTIMIZERS["signum"] = signum
assert MOMENTS["exp_avg"] == 1  # known already: proportional to the gradient
