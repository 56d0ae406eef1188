"""Optimizers, by the name in `train.optimizer`: each file here has a table `OPTIMIZERS`.

A factory gets parameter groups, each with its `ratio` of the learning rate, and the `train`
section. `optimizer_options` override what other keys say.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]


def adam_keys(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that all of Adam's relatives take."""
    return {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def from_package(module: str, name: str, config: TrainConfig) -> Any:
    """Return an optimizer class of a package. Raises ConfigError where it is not installed."""
    package = module.partition(".")[0]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        got = "it is not installed" if isinstance(error, ModuleNotFoundError) else f"{error}"
        raise ConfigError(
            f"`train.optimizer: {config.optimizer}` needs the package {package} (got: "
            f"{' '.join(got.split())}); pip install 'chainlora[{package}]'"
        ) from None
