"""Compute with a two-byte model in float32, casting the weights of one module at a time.

Probes need float32: in bfloat16, a wrong formula and another order of sums can change results by
the same amount; in float32, rounding is a thousand times smaller. Weights are cast when a module
runs, because a float32 copy of the model would need twice its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

TWO_BYTES = (torch.bfloat16, torch.float16)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Cast all two-byte weights and buffers of a module to float32, and restore them at the end."""
    with _held_in_float32(_two_byte_tensors(module, recurse=True)):
        yield


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Cast every module's own two-byte weights to float32 while the module runs.

    For an embedding the output is cast, not the table. A module that reads another module's weights
    may fail with two dtypes; a probe treats that error as a difference.
    """
    contexts: dict[nn.Module, Any] = {}

    def enter(module: nn.Module, _: Any) -> None:
        context = _held_in_float32(_two_byte_tensors(module))
        context.__enter__()
        contexts[module] = context

    def leave(module: nn.Module, *_: Any) -> None:
        if module in contexts:
            contexts.pop(module).__exit__(None, None, None)

    def widen(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.float() if output.dtype in TWO_BYTES else output

    handles = []
    for module in model.modules():
        if not _two_byte_tensors(module):
            continue
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(widen))
        else:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(contexts):
            leave(module)


def _two_byte_tensors(module: nn.Module, *, recurse: bool = False) -> list[Tensor]:
    held = chain(module.parameters(recurse), module.buffers(recurse))
    return [tensor for tensor in held if tensor.dtype in TWO_BYTES]


@contextmanager
def _held_in_float32(tensors: list[Tensor]) -> Iterator[None]:
    stored = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in stored:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in stored:
            tensor.data = data
