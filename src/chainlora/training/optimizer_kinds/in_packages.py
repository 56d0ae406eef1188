"""Optimizers of torch, and of packages that extras install."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError
from chainlora.registry import import_optional
from chainlora.training.optimizer_kinds import Groups, adam_keys


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused."""
    keys = adam_keys(config) | {"fused": True}
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
    """Muon (kellerjordan.github.io/posts/muon), which torch has from version 2.9 on."""
    found: Any = getattr(torch.optim, "Muon", None)
    if found is None:
        raise ConfigError(
            f"`train.optimizer: muon` needs torch 2.9 or later (got {torch.__version__}); upgrade "
            "torch, or use adamw"
        )
    keys: dict[str, Any] = {"weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer = found(groups, config.lr, **keys | config.optimizer_options)
    return optimizer


def schedule_free_adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682), of the package schedulefree."""
    if config.schedule != "constant":
        raise ConfigError(
            "`train.optimizer: schedule_free_adamw` averages weights where others lower the rate "
            f"(got schedule: {config.schedule}); set train.schedule: constant"
        )
    package = import_optional("schedulefree", f"`train.optimizer: {config.optimizer}`")
    optimizer = package.AdamWScheduleFree(
        groups, config.lr, **adam_keys(config) | config.optimizer_options
    )
    optimizer.train()
    return optimizer


def adamw_8bit(name: str, groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (arXiv 2110.02861), of the package bitsandbytes."""
    package = import_optional("bitsandbytes.optim", f"`train.optimizer: {config.optimizer}`")
    return getattr(package, name)(groups, config.lr, **adam_keys(config) | config.optimizer_options)


OPTIMIZERS = {
    "adamw": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "adamw_8bit": partial(adamw_8bit, "AdamW8bit"),
    "paged_adamw_8bit": partial(adamw_8bit, "PagedAdamW8bit"),  # a GPU pages moments to the host
}
