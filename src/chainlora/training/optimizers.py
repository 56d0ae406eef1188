"""Optimizers: each link gets a new one, without the state of the link before.

An optimizer with a method `take_over` gets that state nevertheless. A factory gets parameter
groups, each with its `ratio` of the learning rate, and the `train` section. `optimizer_options`
override other keys. State that is proportional to a power of the gradients must be listed in
`knots.moments.MOMENTS`, so that soft knots can scale it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import Adapter
from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.errors import ConfigError, nearest
from chainlora.knots.moments import unknown_moments
from chainlora.registry import import_optional

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]

_ADAM = {"betas", "eps"}  # arguments that mark variants of Adam
# Factories of plug-ins by the name in `train.optimizer` (`registry`).
OPTIMIZERS: dict[str, Factory] = {}


def adam_keys(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that all variants of Adam take."""
    return {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def check_name(name: str) -> None:
    """Raise ConfigError unless a plug-in or a package has an optimizer of this name."""
    if name not in OPTIMIZERS:
        _class(name)


def reads_adam_keys(name: str) -> bool:
    """Say whether an optimizer reads `train.betas` and `train.eps`; those not of torch may."""
    kind = _classes(torch.optim).get(_plain(name))
    return kind is None or signature(kind).parameters.keys() >= _ADAM


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _classes(package: Any) -> dict[str, Any]:
    return {_plain(name): kind for name, kind in vars(package).items() if isinstance(kind, type)}


def _class(name: str) -> Any:
    """Return a class of torch.optim, or of bitsandbytes if the name ends in `bit`."""
    package: Any = torch.optim
    if name.endswith("bit"):
        package = import_optional("bitsandbytes.optim", f"`train.optimizer: {name}`")
    classes = _classes(package)
    if _plain(name) not in classes:
        raise ConfigError(
            "`train.optimizer` must name a class of torch.optim, such as adamw, one of "
            "bitsandbytes, such as adamw_8bit or lion_32bit, or an optimizer of a plug-in",
            f"{name!r}{nearest(name, [*classes, *OPTIMIZERS])}",
            "if your own file adds it, name the file in `plugins`",
        )
    return classes[_plain(name)]


def _made(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Return an optimizer of a package; `optimizer_options` override other keys."""
    kind = _class(config.optimizer)
    arguments, keys = signature(kind).parameters, {"weight_decay": config.weight_decay}
    if arguments.keys() >= _ADAM:
        keys = adam_keys(config) | {"fused": True}
    keys = {key: value for key, value in keys.items() if key in arguments}
    if kind is torch.optim.SGD:
        keys["momentum"] = 0.9
    optimizer: torch.optim.Optimizer = kind(groups, config.lr, **keys | config.optimizer_options)
    return optimizer


# --- checks before training ---


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError unless the optimizer is known and supports the keys of the config."""
    train, chain = config.train, config.chain
    optimizer = _stepped(train, device)
    if chain.lora_bias:
        _check_vectors(train, device)
    if takes_over(optimizer) and len(set(chain.ranks)) > 1:
        raise ConfigError(
            f"`train.optimizer: {train.optimizer}` keeps its state from link to link, so all ranks "
            f"must be equal (got {list(chain.ranks)}); use adamw, or equal ranks"
        )
    unknown = unknown_moments(optimizer)
    if chain.knots is not None and chain.knots.moments == "carried" and unknown:
        raise ConfigError(
            f"a soft knot must scale each moment (got {', '.join(unknown)} of train.optimizer: "
            f"{train.optimizer}, which cannot be scaled exactly); set chain.knots.moments: new"
        )


def _stepped(train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of one matrix after two steps; raise ConfigError for bad options."""
    matrix = nn.Parameter(torch.zeros(64, 64, device=device))
    low = train.model_copy(update={"lr": min(train.lr, 1.0)})  # a large rate is not tested here
    try:
        optimizer = from_groups([{"params": [matrix], "ratio": 1.0}], low)
        matrix.grad = torch.ones_like(matrix).tril()  # with zeros, like the first gradient of A
        optimizer.step()
        if not matrix.isfinite().all():
            raise ValueError("weights that are not finite where gradients are 0, as by eps: 0")
        optimizer.step()  # some options take effect in the second step
        load_state(optimizer, state_tensors(optimizer))  # a resume does this
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"`train.optimizer_options` must suit {train.optimizer} on {device} (got "
            f"{dict(train.optimizer_options)}: {reason}); see its documentation"
        ) from None
    return optimizer


def _check_vectors(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for an optimizer that trains matrices only (Muon)."""
    vector = nn.Parameter(torch.zeros(2, device=device))
    try:
        from_groups([{"params": [vector], "ratio": 1.0}], train)
    except ValueError:
        raise ConfigError(
            f"`train.optimizer: {train.optimizer}` trains matrices alone (got lora_bias, which has "
            "vectors too); use adamw, or leave lora_bias out"
        ) from None


# --- an optimizer for each link ---


def make_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.Optimizer:
    """Return a new optimizer for a link.

    The learning rate of B is `lora_plus_ratio` times that of A (LoRA+, arXiv 2402.12354).
    """
    groups = [
        {"params": adapter.named_factor("A"), "ratio": 1.0},
        {"params": adapter.named_factor("B"), "ratio": config.lora_plus_ratio},
    ]
    return from_groups(groups, config)


def from_groups(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `train.optimizer` names."""
    return OPTIMIZERS.get(config.optimizer, _made)(groups, config)


# --- the state of an optimizer, on disk and over knots ---


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as flat tensors, named ``"<parameter>.<key>"``.

    Changed values of a parameter group are named ``"<group>.group:<key>"``. A number becomes a
    tensor without dimensions, and its name ends in ``.number``.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # addresses: safetensors refuses a tensor that parameters share
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for position, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                value = value.detach().cpu().contiguous()
                is_shared = value.data_ptr() in seen
                tensors[f"{position}.{key}"] = value.clone() if is_shared else value
                seen.add(value.data_ptr())
            elif value is not None:
                tensors[f"{position}.{key}.number"] = _number(value)
    for position, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            is_number = isinstance(value, bool | int | float)
            is_set_by_the_loop = key in ("lr", "ratio")
            if is_number and not is_set_by_the_loop and value != optimizer.defaults.get(key):
                tensors[f"{position}.group:{key}.number"] = _number(value)
    return tensors


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimizer the state that `state_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for name, tensor in tensors.items():
        position, key, *number = name.split(".")
        value = tensor.item() if number else tensor
        if key.startswith("group:"):
            groups[int(position)][key.removeprefix("group:")] = value
        else:
            state.setdefault(int(position), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def takes_over(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer takes over the state of the link before (method `take_over`)."""
    return callable(getattr(optimizer, "take_over", None))
