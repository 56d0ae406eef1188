"""Patch a caller's model, and restore it.

There are two kinds of patches: a function of this package replaces a module's forward, and the
model's attention implementation is set to ours. `Patches` restores exactly its own changes, so two
of them can work on one model. It never replaces a forward that another library has replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any
from weakref import WeakSet

from torch import nn

_MARK = "_chainlora_forward"

Forward = Callable[..., Any]


def replacement(function: Forward) -> Forward:
    """Mark a function ``f(module, *inputs)`` as a forward for `Patches.replace_forward`."""
    setattr(function, _MARK, True)
    return function


def installed(module: nn.Module) -> Forward | None:
    """Return the marked function that replaces the module's forward, or None."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", None) if getattr(forward, _MARK, False) else None


def is_foreign(module: nn.Module) -> bool:
    """Return whether another library has replaced the module's forward."""
    return "forward" in vars(module) and installed(module) is None


class Patches:
    """Patches that are restored together."""

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()  # weak: adapters are removed in between
        self._attention: list[tuple[Any, str | None]] = []

    def replace_forward(self, module: nn.Module, function: Forward) -> bool:
        """Replace the module's forward by `function`; return whether it is replaced now.

        It is not if another library has replaced the forward, which ours would bypass.
        """
        if installed(module) is function:
            return True
        if "forward" in vars(module):
            return False
        module.forward = MethodType(function, module)
        self._modules.add(module)
        return True

    def set_attention(self, model: nn.Module, rename: Callable[[str | None], str]) -> None:
        """Rename the attention implementation in every config that a module of the model reads."""
        for config in _configs(model):
            before = config._attn_implementation_internal
            if rename(before) != before:
                self._attention.append((config, before))
                config._attn_implementation_internal = rename(before)

    def restore(self) -> None:
        """Undo all changes; safe to call twice."""
        for module in list(self._modules):
            if installed(module):
                del module.forward
        self._modules.clear()
        for config, before in reversed(self._attention):
            config._attn_implementation_internal = before
        self._attention.clear()


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield each distinct transformers config of the model's modules, nested configs included."""
    configs: dict[int, Any] = {}
    todo = [vars(module).get("config") for module in model.modules()]
    while todo:
        config = todo.pop()
        if id(config) in configs or not hasattr(config, "_attn_implementation_internal"):
            continue
        configs[id(config)] = config
        todo += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    yield from configs.values()
