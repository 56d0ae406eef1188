"""A model of which each process holds a share: every weight is cut into rows, one part a process.

`shard` is PyTorch's FSDP2 (`fully_shard`). Between forwards a weight is a DTensor that is cut along
its first dimension. While a layer runs, forward or backward, its weights are whole; then they are
freed again. Each such layer is an exchange between all processes, so all of them must make the same
forwards in the same order.

Whoever reads or writes weights between forwards asks here: `local` (the rows at hand), `rows`
(which ones they are), `gathered` (all of them, from all processes).

`share_by_zero3` is DeepSpeed's ZeRO-3, for which the same functions answer, but for `rows`: it
flattens every weight and cuts it into equal ranges of numbers. Hooks on each module gather its
weights from all processes before it runs, and free them afterwards. So a weight is there while its
own module is called, and nothing can be merged into a range by one process alone. What is called
here is documented: `deepspeed.init_distributed`, `zero.Init`, `zero.GatheredParameters`, and
`deepspeed.initialize` without an optimizer. Of what it leaves on parameters and modules, ``ds_id``,
``ds_shape`` and ``ds_tensor`` are read. It replaces `torch.nn.functional.linear` in the process by
one that does not keep a view of a gathered weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from chainlora.errors import ModelError, explained
from chainlora.models.checkpoint import ALL
from chainlora.models.text_config import base_model

Result = TypeVar("Result")

_INSIDE = "_chainlora_inside"  # name of the method that `inside` calls
_PREFETCHED = 50_000_000  # numbers that ZeRO-3 gathers at once, ahead of need: DeepSpeed's default


# --- tensors ---


def is_shard(tensor: Tensor) -> bool:
    """Say whether a tensor is held in parts, one in each process."""
    return hasattr(tensor, "full_tensor") or _is_range(tensor)


def _is_range(tensor: Any) -> bool:
    """Say whether a tensor is held as a range of the flattened weight, by ZeRO-3."""
    return hasattr(tensor, "ds_id")


def local(tensor: Any) -> Tensor:
    """Return the rows that this process holds, in place: writing them writes the weight.

    Of ZeRO-3, what it holds is a range of the flattened weight.
    """
    if _is_range(tensor):
        return tensor.ds_tensor.detach()
    return tensor.detach().to_local() if is_shard(tensor) else tensor


def rows(tensor: Any) -> slice:
    """Return which rows `local` holds: all of them where the tensor is whole."""
    if _is_range(tensor):
        raise ModelError(
            "links can be merged into rows of a weight alone (got ranges of the flattened weight, "
            "by ZeRO-3); use hold: carried, or train.shard: fsdp2"
        )
    if not is_shard(tensor):
        return ALL
    mesh, total = tensor.device_mesh, int(tensor.shape[0])
    size = -(-total // mesh.size())
    first = min(mesh.get_local_rank() * size, total)
    return slice(first, min(first + size, total))


def gathered(tensor: Any) -> Tensor:
    """Return the whole tensor. All processes must ask for the same one."""
    if not _is_range(tensor):
        return tensor.full_tensor() if is_shard(tensor) else tensor
    from deepspeed import zero

    with zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, of which this process may hold a part."""
    return tuple(tensor.ds_shape if _is_range(tensor) else tensor.shape)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state dict, of which this process may hold parts."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=by_module(model))
    return found


# --- modules ---


def is_sharded(module: nn.Module) -> bool:
    """Say whether a module gathers its weights when it runs, and frees them afterwards."""
    return hasattr(module, "_get_fsdp_state") or by_module(module)


def by_module(module: nn.Module) -> bool:
    """Say whether each module gathers its own weights when it is called, and no others: ZeRO-3."""
    return hasattr(module, "ds_id")


def num_hooks(module: nn.Module) -> int:
    """Return how many hooks of a module's forward gather and free its weights."""
    return 0 if not is_sharded(module) else 4 if by_module(module) else 2


def plain_type(module: nn.Module) -> type:
    """Return the class of a module as it was before `shard`."""
    return type(module).__mro__[2] if hasattr(module, "_get_fsdp_state") else type(module)


def in_forward(model: nn.Module, compute: Callable[[], Result]) -> Result:
    """Return what `compute` returns, which calls parts of the model: one forward of it.

    ZeRO-3 counts forwards of the model, to know in which order weights will be needed.
    """
    return _called(model, compute) if by_module(model) else compute()


def inside(module: nn.Module, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the module's own weights are whole.

    As in a forward of the module, they are whole again in the backward of the result. `module` is
    a sharded model or its head.
    """
    if by_module(module):
        return _called(module, compute, *inputs)
    found: Result = getattr(module, _INSIDE)(compute, *inputs)
    return found


def at_head(model: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed while the weights of the head are whole."""
    if by_module(model):
        head = model.get_output_embeddings()  # another kind than a linear layer is called
        return inside(head, compute, *inputs) if is_sharded(head) else compute(*inputs)
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


def _called(module: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return ``compute(*inputs)``, computed as the forward of `module`, with its hooks around it.

    So its own weights are whole meanwhile, and in the backward of the result.
    """
    before = vars(module).get("forward")

    def forward(*inputs: Tensor) -> Result:
        restore()  # a call inside is an ordinary one
        return compute(*inputs)

    def restore() -> None:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before

    module.forward = forward
    try:
        result: Result = module(*inputs)
        return result
    finally:
        restore()


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


# --- ZeRO-3 ---


def share_by_zero3(
    model: Any, read: Callable[[str], Tensor] | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Cut the weights of a frozen model, in place, one range for each process.

    `read` returns a stored tensor by the name of its parameter. The first process reads them one
    module at a time and sends each to all, so that none holds the whole model. Without `read`, the
    model has its weights already, the same in each process.

    Raises ModelError where DeepSpeed does not take the model, and for experts in a list: each
    process calls others of them, and a call is an exchange between all.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("experts"):
            raise ModelError(
                "processes that share a model by ZeRO-3 must all call the same modules (got "
                f"{name}, a list of experts, of which each calls those of its tokens); set "
                "train.shard: fsdp2"
            )
    import deepspeed

    config = _zero3_config(model, dtype)
    rule, place = "DeepSpeed must be able to share the model", f"from {type(model).__name__}"
    with explained(rule, place, "set train.shard: fsdp2"):
        deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
        if read is not None:
            _fill_zero3(model, read, device, config)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        engine, *_ = deepspeed.initialize(model=model, config=config)
    vars(model)["_chainlora_zero3"] = engine  # its end would take the hooks off


def _zero3_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's config: a process holds its ranges, vectors, and what runs or is next."""
    sizes = [p.numel() for p in model.parameters()]
    vectors = max((p.numel() for p in model.parameters() if p.dim() < 2), default=0)
    return {
        "train_micro_batch_size_per_gpu": 1,  # must be given; its own loaders alone read it
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": vectors,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * max(sizes),
            "stage3_prefetch_bucket_size": min(max(sizes), _PREFETCHED),
        },
    }


@torch.no_grad()
def _fill_zero3(
    model: nn.Module, read: Callable[[str], Tensor], device: torch.device, config: dict[str, Any]
) -> None:
    """Give a model on the meta device its weights, cut module by module, and its saved buffers."""
    from deepspeed import zero

    names = {parameter: name for name, parameter in model.named_parameters()}
    made: dict[Tensor, nn.Parameter] = {}  # weights may be shared between modules
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(read(name))
    for module in reversed(list(model.modules())):  # what lies inside a module comes before it
        own = dict(module.named_parameters(recurse=False))
        for key, parameter in own.items():
            if parameter not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if distributed.get_rank() == 0:
                    value.copy_(read(names[parameter]))
                made[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[key] = made[parameter]
        if own:
            zero.Init(module=module, config_dict_or_path=config)
