"""Compute with a two-byte model in float32, casting the weights of one module at a time.

Probes need float32: in bfloat16, a wrong formula and another order of sums can change results by
the same amount; in float32, rounding is a thousand times smaller. Weights are cast when a module
runs, because a float32 copy of the model would need twice its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.models.text_config import compute_dtype

TWO_BYTES = (torch.bfloat16, torch.float16)
_Stored = dict[nn.Module, list[tuple[Tensor, Tensor]]]  # widened tensors, and their own data


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Cast all two-byte weights and buffers of a module to float32, and restore them at the end."""
    stored: _Stored = {}
    try:
        _widen(module, stored, recurse=True)
        yield
    finally:
        _restore(module, stored)


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Cast every module's own two-byte weights to float32 while the module runs.

    For an embedding the output is cast, not the table. A module that reads another module's weights
    may fail with two dtypes; a probe treats that error as a difference. A model whose embedding is
    not two-byte is left alone.
    """
    stored: _Stored = {}

    def enter(module: nn.Module, _: Any) -> None:
        _widen(module, stored)

    def leave(module: nn.Module, *_: Any) -> None:
        _restore(module, stored)

    def widen_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.float() if output.dtype in TWO_BYTES else output

    with ExitStack() as ends:
        for module in model.modules() if compute_dtype(model) in TWO_BYTES else ():
            if not _two_byte_tensors(module):
                continue
            ends.callback(_restore, module, stored)
            if isinstance(module, nn.Embedding):
                ends.enter_context(module.register_forward_hook(widen_output))
            else:
                ends.enter_context(module.register_forward_pre_hook(enter))
                ends.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def _two_byte_tensors(module: nn.Module, *, recurse: bool = False) -> list[Tensor]:
    held = chain(module.parameters(recurse), module.buffers(recurse))
    return [tensor for tensor in held if tensor.dtype in TWO_BYTES]


def _widen(module: nn.Module, stored: _Stored, *, recurse: bool = False) -> None:
    for tensor in _two_byte_tensors(module, recurse=recurse):
        stored.setdefault(module, []).append((tensor, tensor.data))
        tensor.data = tensor.data.float()


def _restore(module: nn.Module, stored: _Stored) -> None:
    for tensor, data in stored.pop(module, ()):
        tensor.data = data
