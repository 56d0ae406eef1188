"""Optimizers, by the name in `train.optimizer`: each file here has a table `OPTIMIZERS`.

A factory gets parameter groups, each with its `ratio` of the learning rate, and the `train`
section. `optimizer_options` override what other keys say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chainlora.config.schema import TrainConfig

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]


def adam_keys(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that all of Adam's relatives take."""
    return {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
