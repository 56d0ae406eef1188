"""How each optimizer is made from the config, and the small ones that torch does not have.

A factory gets parameter groups and the `train` section. `optimizer_options` override what other
keys say.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]


# --- in torch ---


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused."""
    keys = _adam_keys(config) | {"fused": True}
    return torch.optim.AdamW(groups, config.lr, **keys | config.optimizer_options)


def sgd(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    keys: dict[str, Any] = {"momentum": 0.9, "weight_decay": config.weight_decay}
    return torch.optim.SGD(groups, config.lr, **keys | config.optimizer_options)


def adafactor(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235): its rate is relative to the size of a factor."""
    keys: dict[str, Any] = {"weight_decay": config.weight_decay}
    return torch.optim.Adafactor(groups, config.lr, **keys | config.optimizer_options)


def muon(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon: torch's, from version 2.9 on, or `Muon`."""
    keys: dict[str, Any] = {"weight_decay": config.weight_decay}
    found: Any = getattr(torch.optim, "Muon", Muon)
    optimizer: torch.optim.Optimizer = found(groups, config.lr, **keys | config.optimizer_options)
    return optimizer


# --- here ---


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
        """Make one step."""
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                moment = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, moment, fast).sign_(), alpha=group["lr"])
                moment.lerp_(p.grad, 1 - slow)


class Muon(torch.optim.Optimizer):
    """The nearest orthogonal matrix to the momentum (kellerjordan.github.io/posts/muon).

    For versions of torch that have none; the same steps as torch's, and its defaults.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                p.mul_(1 - rate * group["weight_decay"])
                rows, columns = p.shape
                scale = max(1.0, rows / columns) ** 0.5
                p.sub_(_orthogonal(ahead, group).to(p.dtype), alpha=rate * scale)


def _orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Return about U·Vᵀ of a matrix U·Σ·Vᵀ, by Newton–Schulz steps in bfloat16."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


# --- in packages of their own ---


def schedule_free_adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682), of the package schedulefree."""
    if config.schedule != "constant":
        raise ConfigError(
            "`train.optimizer: schedule_free_adamw` averages weights where others lower the rate "
            f"(got schedule: {config.schedule}); set train.schedule: constant"
        )
    found = _from_package("schedulefree", "AdamWScheduleFree", config)
    optimizer = found(groups, config.lr, **_adam_keys(config) | config.optimizer_options)
    optimizer.train()
    return optimizer


def adamw_8bit(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (arXiv 2110.02861), of the package bitsandbytes."""
    found = _from_package("bitsandbytes.optim", "AdamW8bit", config)
    return found(groups, config.lr, **_adam_keys(config) | config.optimizer_options)


def paged_adamw_8bit(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """The same, its moments in memory that a GPU pages out to the host."""
    found = _from_package("bitsandbytes.optim", "PagedAdamW8bit", config)
    return found(groups, config.lr, **_adam_keys(config) | config.optimizer_options)


def _adam_keys(config: TrainConfig) -> dict[str, Any]:
    return {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _from_package(module: str, name: str, config: TrainConfig) -> Any:
    package = module.partition(".")[0]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        got = "it is not installed" if isinstance(error, ModuleNotFoundError) else f"{error}"
        raise ConfigError(
            f"`train.optimizer: {config.optimizer}` needs the package {package} (got: "
            f"{' '.join(got.split())}); pip install 'chainlora[{package}]'"
        ) from None
