"""Change the mode of a model or the state of generators for a while, and restore it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Set every module to evaluation (or training) mode, and restore its mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, training in modes:
            module.training = training


def switch_activation_checkpointing(model: Any, *, is_on: bool) -> None:
    """Switch the recomputation of activations in the backward pass on or off.

    Raises ValueError if the model class does not support it.
    """
    end = "enable" if is_on else "disable"
    before = getattr(model, f"gradient_checkpointing_{end}")  # its name in older transformers
    switch = getattr(model, f"activation_checkpointing_{end}", before)
    switch(*([{"use_reentrant": False}] if is_on else []))
    if not is_on and hasattr(model, "_require_grads_hook"):  # newer versions add it when enabling
        model.disable_input_require_grads()


def seeded(name: str) -> torch.Generator:
    """Return a CPU generator seeded by a name: equal names draw equal numbers."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Restore torch's generators, on the CPU and the model's device, at the end."""
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield
