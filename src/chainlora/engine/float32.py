"""Let a model of two-byte weights compute in float32 for a while, one module's weights at a time.

In bfloat16 a layer of another formula and a layer whose sums ran in another order differ by about
as much; in float32 rounding is a thousand times smaller than any mistake. A float32 copy of a whole
model would be twice its memory, so weights are widened as they are used.
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
    """Hold the two-byte weights and buffers of `module`, all of them, in float32."""
    with _held_in_float32(_two_byte_tensors(module, recurse=True)):
        yield


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Let every module widen its own two-byte weights while it runs.

    An embedding's output is widened instead of its table. A module that reads another's weights
    may trip over two dtypes; whoever probes takes that for a no.
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
