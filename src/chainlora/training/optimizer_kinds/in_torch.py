"""Optimizers that torch has."""

from __future__ import annotations

from typing import Any

import torch

from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError
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


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "adafactor": adafactor, "muon": muon}
