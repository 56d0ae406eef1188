"""Run a model in another mode for a while and leave it as it was; draw beside torch's own state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Switch every module to evaluation (or training) mode, and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, training in modes:
            module.training = training


def switch_activation_checkpointing(model: Any, *, is_on: bool) -> None:
    """Let a model recompute activations in the backward, or no longer.

    Raises ValueError for a class that is not made for it.
    """
    end = "enable" if is_on else "disable"
    before = getattr(model, f"gradient_checkpointing_{end}")  # its name in older transformers
    switch = getattr(model, f"activation_checkpointing_{end}", before)
    switch(*([{"use_reentrant": False}] if is_on else []))
    if not is_on and hasattr(model, "_require_grads_hook"):  # which enabling has put on, newly
        model.disable_input_require_grads()


def seeded(name: str) -> torch.Generator:
    """Return a generator on the CPU that draws the same for the same name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Put torch's generators, on the CPU and on the model's device, back at the end."""
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
