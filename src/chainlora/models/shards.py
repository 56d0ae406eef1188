"""Shard a model: every process stores some rows of each weight.

`shard` uses PyTorch's FSDP2 (`fully_shard`). Between forward passes a weight is a DTensor, cut
along its first dimension. While a layer runs, forward or backward, its weights are gathered;
afterwards they are freed. All processes take part in each gather, so all must run the same forward
passes in the same order.

To read or write weights between forward passes, use `local` (the rows on this process), `rows`
(their indices) and `gathered` (all rows, from all processes).
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
    """Return whether several processes store parts of this tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Return a view of the rows on this process: writing it writes the weight."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor


def rows(tensor: Any) -> slice:
    """Return the row indices of `local`: all rows unless the tensor is sharded."""
    if not is_shard(tensor):
        return ALL
    mesh, total = tensor.device_mesh, int(tensor.shape[0])
    size = -(-total // mesh.size())
    first = min(mesh.get_local_rank() * size, total)
    return slice(first, min(first + size, total))


def gathered(tensor: Any) -> Tensor:
    """Return the whole tensor. All processes must call it for the same tensor."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


# --- modules ---


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module gathers its weights when it runs."""
    return hasattr(module, "_get_fsdp_state")


def num_hooks(module: nn.Module) -> int:
    """Return the number of forward hooks that gather and free a module's weights."""
    return 2 if is_sharded(module) else 0


def plain_type(module: nn.Module) -> type:
    """Return the class of a module before `shard`."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


def inside(module: nn.Module, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the weights of a module are gathered.

    They are gathered again in the backward pass of the result, as for a forward of the module.

    Args:
        module: a sharded model or its head, after `start`.
        compute: a function that uses the module's weights.
        inputs: its arguments.
    """
    result: Result = getattr(module, _INSIDE)(compute, *inputs)
    return result


def at_head(model: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the weights of the head are gathered."""
    return inside(_head_of(model) or model, compute, *inputs)


@contextmanager
def whole(module: Any) -> Iterator[None]:
    """Gather a layer's weights on all processes, and free them at the end."""
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
    """Cut the weights of a frozen model into parts, in place, one per process.

    The weights of each decoder layer, of the embedding, of the head and of the remaining modules
    are gathered together. Weights on the meta device stay there.

    Args:
        model: the whole model.
        count: number of processes.
        device: device of this process.

    Raises:
        ModelError: FSDP2 cannot shard the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    body, head = _innermost(base_model(model)), _head_of(model)
    embedding = model.get_input_embeddings()
    try:
        for unit in [*_layers(body), *_ends(embedding, head), body, model]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise _unsuited(model, error) from error


def start(model: Any) -> None:
    """Finish a sharded model once it has weights: register `inside`, and initialize FSDP2.

    Raises:
        ModelError: FSDP2 cannot shard the model.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in {model, _head_of(model) or model}:
        setattr(module, _INSIDE, _call)
        register_fsdp_forward_method(module, _INSIDE)
    try:
        inside(model, lambda: None)
    except ValueError as error:  # weights shared between layers
        raise _unsuited(model, error) from error


def _call(compute: Callable[..., Result], *inputs: Tensor) -> Result:
    return compute(*inputs)


def _head_of(model: Any) -> nn.Module | None:
    """Return the head if it is a linear layer and a direct child of the model, else None."""
    head = model.get_output_embeddings()
    is_child = isinstance(head, nn.Linear) and any(child is head for child in model.children())
    return head if is_child else None


def _ends(embedding: nn.Module, head: nn.Module | None) -> list[Any]:
    """Return embedding and head as units to gather: one unit if they share their weight."""
    if head is None:
        return []
    if head.weight is embedding.weight:
        return [[embedding, head]]
    return [embedding, head]


def _innermost(body: nn.Module) -> nn.Module:
    """Return the innermost module with all parameters: OPT calls it without its wrapper."""
    inner = [child for child in body.children() if any(True for _ in child.parameters())]
    is_wrapper = len(inner) == 1 and not isinstance(inner[0], nn.ModuleList)
    has_parameters = any(True for _ in body.parameters(recurse=False))
    return _innermost(inner[0]) if is_wrapper and not has_parameters else body


def _layers(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the outermost module lists: the decoder layers."""
    for child in body.children():
        if isinstance(child, nn.ModuleList):
            yield from (module for module in child if any(True for _ in module.parameters()))
        else:
            yield from _layers(child)


def _unsuited(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"`train.shard` needs a model that fully_shard supports (got {error!s:.200} from "
        f"{type(model).__name__}); leave it out: each process then holds the whole model"
    )
