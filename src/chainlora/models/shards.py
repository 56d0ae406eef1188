"""A model of which each process holds a share: every weight is cut into rows, one part a process.

`shard` is PyTorch's FSDP2 (`fully_shard`). Between forwards a weight is a DTensor that is cut along
its first dimension. While a layer runs, forward or backward, its weights are whole; then they are
freed again. Each such layer is an exchange between all processes, so all of them must make the same
forwards in the same order.

Whoever reads or writes weights between forwards asks here: `local` (the rows at hand), `rows`
(which ones they are), `gathered` (all of them, from all processes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chainlora.errors import ModelError
from chainlora.models.checkpoint import ALL
from chainlora.models.text_config import base_model

Result = TypeVar("Result")

_INSIDE = "_chainlora_inside"  # name of the method that `inside` calls


# --- tensors ---


def is_shard(tensor: Tensor) -> bool:
    """Say whether a tensor is held in parts, one in each process."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Return the rows that this process holds, in place: writing them writes the weight."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor


def rows(tensor: Any) -> slice:
    """Return which rows `local` holds: all of them where the tensor is whole."""
    if not is_shard(tensor):
        return ALL
    mesh, total = tensor.device_mesh, int(tensor.shape[0])
    size = -(-total // mesh.size())
    first = min(mesh.get_local_rank() * size, total)
    return slice(first, min(first + size, total))


def gathered(tensor: Any) -> Tensor:
    """Return the whole tensor. All processes must ask for the same one."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


# --- modules ---


def is_sharded(module: nn.Module) -> bool:
    """Say whether a module gathers its weights when it runs, and frees them afterwards."""
    return hasattr(module, "_get_fsdp_state")


def num_hooks(module: nn.Module) -> int:
    """Return how many hooks of a module's forward gather and free its weights."""
    return 2 if is_sharded(module) else 0


def plain_type(module: nn.Module) -> type:
    """Return the class of a module as it was before `shard`."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


def inside(module: nn.Module, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the module's own weights are whole.

    As in a forward of the module, they are whole again in the backward of the result. `module` is
    a sharded model or its head.
    """
    found: Result = getattr(module, _INSIDE)(compute, *inputs)
    return found


def at_head(model: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the weights of the head are whole."""
    return inside(_own_head(model) or model, compute, *inputs)


@contextmanager
def whole(module: Any) -> Iterator[None]:
    """Hold a layer's weights whole, on all processes."""
    if not is_sharded(module):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


# --- FSDP2 ---


def shard(model: Any, count: int, device: torch.device) -> None:
    """Cut the weights of a frozen model into parts, in place, one for each of `count` processes.

    Gathered together are the weights of one decoder layer, of the embedding, of the head, and the
    few that are left. Weights on the meta device stay there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    body, head = _innermost(base_model(model)), _own_head(model)
    embedding = model.get_input_embeddings()
    try:
        for unit in [*_layers(body), *_ends(embedding, head), body, model]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise _unsuited(model, error) from error


def start(model: Any) -> None:
    """Let a sharded model with weights settle which of its modules gathers what."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in {model, _own_head(model) or model}:
        setattr(module, _INSIDE, _call)
        register_fsdp_forward_method(module, _INSIDE)
    try:
        inside(model, lambda: None)
    except ValueError as error:  # weights shared between layers
        raise _unsuited(model, error) from error


def _call(compute: Callable[..., Result], *inputs: Tensor) -> Result:
    return compute(*inputs)


def _own_head(model: Any) -> nn.Module | None:
    """Return the head where it is one linear layer right below the model."""
    head = model.get_output_embeddings()
    is_own = isinstance(head, nn.Linear) and any(child is head for child in model.children())
    return head if is_own else None


def _ends(embedding: nn.Module, head: nn.Module | None) -> list[Any]:
    """Return embedding and head, together where they are one weight."""
    if head is None:
        return []
    if head.weight is embedding.weight:
        return [[embedding, head]]
    return [embedding, head]


def _innermost(body: nn.Module) -> nn.Module:
    """Return the module below that holds all there is: some models call it past the one above
    (OPT)."""
    inner = [child for child in body.children() if any(True for _ in child.parameters())]
    is_shell = len(inner) == 1 and not isinstance(inner[0], nn.ModuleList)
    has_own = any(True for _ in body.parameters(recurse=False))
    return _innermost(inner[0]) if is_shell and not has_own else body


def _layers(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the outermost lists: decoder layers."""
    for child in body.children():
        if isinstance(child, nn.ModuleList):
            yield from (module for module in child if any(True for _ in module.parameters()))
        else:
            yield from _layers(child)


def _unsuited(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"fully_shard must suit the model (got {error!s:.200} from "
        f"{type(model).__name__}); leave train.shard out: each process then holds all of it"
    )
