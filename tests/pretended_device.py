"""A device without hardware: tests that train or score by commands or by `chainlora.train` use it.

    PYTHONPATH=tests pytest -p pretended_device tests/training/test_golden_losses.py

Its tensors compute on the CPU, and are refused where a GPU's are: beside tensors of the CPU, and in
NumPy. So tests show tensors that were left on another device. It is a backend in Python
(`torch.utils.backend_registration`), and the accelerator that torch and Accelerate find. Kernels of
a GPU, its memory, streams and random numbers are not covered.

Not by `FakeTensorMode`: it has no values, which training reads at every step (is the loss finite?),
and no CUDA device where torch is built without CUDA.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.library import Library
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
aten = torch.ops.aten
# On a GPU too, these copy between devices, or take indices on the CPU.
MAY_MIX = (aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_)


class Pretended(torch.Tensor):
    """A tensor of the CPU, `inner`, that says that it is on the device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        keys: Any = {"dispatch_device": True, "device_for_backend_keys": torch.device(NAME, 0)}
        made: Any = torch.Tensor._make_subclass(cls, inner.detach(), False, **keys)
        made.inner = inner
        return made

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Pretended) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device(NAME, 0)
        _refuse_two_devices(func, (args, kwargs))
        inner = {key: value for key, value in kwargs.items() if key != "device"}
        device = kwargs.get("device")
        if device is not None and func is not aten._to_copy.default:
            inner["device"] = "cpu"
        found = func(*tree_map(_inner, args), **tree_map(_inner, inner))
        if device is not None and torch.device(device).type == "cpu":
            return found
        if func is aten.copy_.default and not isinstance(args[0], Pretended):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_pretended, found))


def _refuse_two_devices(func: Any, arguments: Any) -> None:
    """Raise RuntimeError for a tensor of the CPU, unless it has no dimension."""
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor)]
    others = [each for each in tensors if not isinstance(each, Pretended) and each.dim()]
    if others and func.overloadpacket not in MAY_MIX:
        raise RuntimeError(f"{func}: tensors are on {NAME} and on {others[0].device}")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _pretended(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, Pretended)
    return Pretended(value) if is_plain else value


# --- what torch asks of a backend ---


class _Module(backend_registration._DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return Pretended(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Any:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    _inner(target).copy_(_inner(source))
    return target


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
LIBRARY = Library("aten", "IMPL")
for name, kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
}.items():
    LIBRARY.impl(name, kernel, "PrivateUse1")
