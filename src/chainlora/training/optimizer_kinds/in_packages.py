"""Optimizers of other packages, installed by extras."""

from __future__ import annotations

from functools import partial

import torch

from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError
from chainlora.training.optimizer_kinds import Groups, adam_keys, from_package


def schedule_free_adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682), of the package schedulefree."""
    if config.schedule != "constant":
        raise ConfigError(
            "`train.optimizer: schedule_free_adamw` averages weights where others lower the rate "
            f"(got schedule: {config.schedule}); set train.schedule: constant"
        )
    found = from_package("schedulefree", "AdamWScheduleFree", config)
    optimizer = found(groups, config.lr, **adam_keys(config) | config.optimizer_options)
    optimizer.train()
    return optimizer


def adamw_8bit(name: str, groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (arXiv 2110.02861), of the package bitsandbytes."""
    found = from_package("bitsandbytes.optim", name, config)
    return found(groups, config.lr, **adam_keys(config) | config.optimizer_options)


OPTIMIZERS = {
    "schedule_free_adamw": schedule_free_adamw,
    "adamw_8bit": partial(adamw_8bit, "AdamW8bit"),
    "paged_adamw_8bit": partial(adamw_8bit, "PagedAdamW8bit"),  # a GPU pages moments to the host
}
