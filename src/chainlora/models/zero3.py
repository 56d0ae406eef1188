"""A model that processes share by DeepSpeed's ZeRO-3, frozen: links are whole beside it.

ZeRO-3 flattens every weight and cuts it into equal ranges of numbers. Hooks on each module gather
its weights from all processes before it runs, forward or backward, and free them afterwards. So a
weight is there while its own module is called, and a function that reads weights of others is not
served. Ranges are not rows: nothing can be merged into them by one process alone.

What is called here is documented: `deepspeed.init_distributed`, `zero.Init`,
`zero.GatheredParameters`, and `deepspeed.initialize` without an optimizer. Of what it leaves on
parameters and modules, ``ds_id``, ``ds_shape`` and ``ds_tensor`` are read. It replaces
`torch.nn.functional.linear` in the process by one that does not keep a view of a gathered weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from chainlora.errors import ModelError

Result = TypeVar("Result")

_PREFETCHED = 50_000_000  # numbers that are gathered at once, ahead of need: DeepSpeed's default


def is_cut(held: Any) -> bool:
    """Say whether a parameter, or a module, is one of a model that is shared by ZeRO-3."""
    return hasattr(held, "ds_id")


def gathered(parameter: Any) -> Tensor:
    """Return a copy of the whole parameter. All processes must ask for the same one."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def called(module: Any, compute: Callable[..., Result], *inputs: Tensor) -> Result:
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


def share(
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

    config = _config(model, dtype)
    try:
        deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
        if read is not None:
            _fill(model, read, device, config)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        engine, *_ = deepspeed.initialize(model=model, config=config)
    except Exception as error:
        raise ModelError(
            f"DeepSpeed must be able to share the model (got {type(error).__name__}: "
            f"{error!s:.200} from {type(model).__name__}); set "
            "train.shard: fsdp2"
        ) from error
    vars(model)["_chainlora_zero3"] = engine  # its end would take the hooks off


def _config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
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
def _fill(
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
