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
from chainlora.models.text_config import base_model, has_parameters, outermost_lists

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

    They are gathered again in the backward pass of the result, as for a forward of the module. The
    module is a sharded model or its head, after `start`.
    """
    result: Result = getattr(module, _INSIDE)(compute, *inputs)
    return result


def at_head(model: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the weights of the head are gathered."""
    return inside(_head_of(model) or model, compute, *inputs)


@contextmanager
def whole(module: Any) -> Iterator[None]:
    """Gather a layer's weights on all processes, and free them at the end."""
    if is_sharded(module):
        module.unshard()
    try:
        yield
    finally:
        if is_sharded(module):
            module.reshard()


# --- FSDP2 ---


def shard(model: Any, count: int, device: torch.device) -> None:
    """Cut the weights of a frozen model into parts, in place, one per process.

    The weights of each decoder layer, of the embedding, of the head and of the remaining modules
    are gathered together. Weights on the meta device stay there. Raises ModelError if FSDP2 cannot
    shard the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    body, head = _innermost(base_model(model)), _head_of(model)
    embedding = model.get_input_embeddings()
    ends: list[Any] = [] if head is None else [embedding, head]
    if head is not None and head.weight is embedding.weight:
        ends = [ends]  # one unit
    layers = [x for each in outermost_lists(body) for x in each if has_parameters(x)]
    try:
        for unit in [*layers, *ends, body, model]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise _unsuited(model, error) from error


def start(model: Any) -> None:
    """Finish a sharded model once it has weights: register `inside`, and initialize FSDP2.

    Raises ModelError if FSDP2 cannot shard the model.
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


def _innermost(body: nn.Module) -> nn.Module:
    """Return the innermost module with all parameters: OPT calls it without its wrapper."""
    inner = [child for child in body.children() if has_parameters(child)]
    is_wrapper = len(inner) == 1 and not isinstance(inner[0], nn.ModuleList)
    is_wrapper &= not has_parameters(body, recurse=False)
    return _innermost(inner[0]) if is_wrapper else body


def _unsuited(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"`train.shard` needs a model that fully_shard supports (got {error!s:.200} from "
        f"{type(model).__name__}); leave it out: each process then holds the whole model"
    )
