"""Changes to a model that is not ours: put on once a run, recognised, taken back.

Two kinds: a module's forward is replaced by a function of this package, and the model's attention
implementation is set to ours. `Patches` records what it changed and restores exactly that, so two
of them on one model do not undo each other. A forward that somebody else replaced before is left
alone.
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
    """Mark a function ``f(module, *inputs)`` as a forward that `Patches` may put on a module."""
    setattr(function, _MARK, True)
    return function


def installed(module: nn.Module) -> Forward | None:
    """Return the function of ours that runs as the module's forward, or None."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", None) if getattr(forward, _MARK, False) else None


def is_foreign(module: nn.Module) -> bool:
    """Say whether somebody else has replaced the module's forward."""
    return "forward" in vars(module) and installed(module) is None


class Patches:
    """Changes to models that are taken back together."""

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()  # adapters come and go: hold none of them
        self._attention: list[tuple[Any, str | None]] = []

    def replace_forward(self, module: nn.Module, function: Forward) -> bool:
        """Let `function` run as the module's forward; return whether it does now.

        False where another library has replaced the forward: ours would bypass it.
        """
        if installed(module) is function:
            return True
        if "forward" in vars(module):
            return False
        module.forward = MethodType(function, module)
        self._modules.add(module)
        return True

    def set_attention(self, model: nn.Module, rename: Callable[[str | None], str]) -> None:
        """Set the attention implementation in every config that a module of `model` reads.

        `rename` returns the new name for the one that is set.
        """
        for config in _configs(model):
            before = config._attn_implementation_internal
            if rename(before) != before:
                self._attention.append((config, before))
                config._attn_implementation_internal = rename(before)

    def restore(self) -> None:
        """Take every change back; safe to call twice."""
        for module in list(self._modules):
            if installed(module):
                del module.forward
        self._modules.clear()
        while self._attention:
            config, before = self._attention.pop()
            config._attn_implementation_internal = before


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield each distinct transformers config below `model`, with the configs nested in it."""
    found: dict[int, Any] = {}
    todo = [vars(module).get("config") for module in model.modules()]
    while todo:
        config = todo.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        todo += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    yield from found.values()
