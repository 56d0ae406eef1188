"""Run a model in evaluation mode for a while, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation mode, and give each its own mode back."""
    with kept_modes(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to training mode, and give each its own mode back."""
    with kept_modes(model):
        model.train()
        yield


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own training or evaluation mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Put torch's generators, on the CPU and on the model's device, back at the end."""
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
