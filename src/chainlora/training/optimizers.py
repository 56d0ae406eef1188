"""The optimizer of one link: a new one for each, so that it knows nothing of the links before,
unless it takes over what the one before held.

The factories are in `optimizer_kinds`. What of an optimizer's state is proportional to gradients
must be in `knots.moments.MOMENTS`, so that soft knots can carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import Adapter
from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.errors import ConfigError
from chainlora.knots.moments import unknown_moments
from chainlora.registry import entries, entry
from chainlora.training import optimizer_kinds
from chainlora.training.optimizer_kinds import Factory, Groups

# By the name in `train.optimizer`; one of your own is added by a plug-in (`registry`).
OPTIMIZERS: dict[str, Factory] = entries(optimizer_kinds, "OPTIMIZERS")

# --- what can be refused before training ---


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError unless the optimizer is known and can do what the config asks of it."""
    train, chain = config.train, config.chain
    optimizer = _stepped(train, device)
    if chain.lora_bias:
        _check_vectors(train, device)
    if takes_over(optimizer) and len(set(chain.ranks)) > 1:
        raise ConfigError(
            f"`train.optimizer: {train.optimizer}` goes on from link to link, so all ranks must be "
            f"equal (got {list(chain.ranks)}); use adamw, or equal ranks"
        )
    if chain.knots is not None and _has_average(optimizer):
        raise ConfigError(
            "soft knots tie a share of one set of weights (got train.optimizer: "
            f"{train.optimizer}, which keeps two: those it steps from, and their average); leave "
            "chain.knots out"
        )
    unknown = unknown_moments(optimizer)
    if chain.knots is not None and chain.knots.moments == "carried" and unknown:
        raise ConfigError(
            f"a soft knot must scale each moment (got {', '.join(unknown)} of train.optimizer: "
            f"{train.optimizer}, which cannot be scaled exactly); set chain.knots.moments: new"
        )


def _stepped(train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of one matrix after two steps, so that its state can be looked at."""
    matrix = nn.Parameter(torch.zeros(64, 64, device=device))
    low = train.model_copy(update={"lr": min(train.lr, 1.0)})  # it is not to overflow by its rate
    try:
        optimizer = from_groups([{"params": [matrix], "ratio": 1.0}], low)
        matrix.grad = torch.ones_like(matrix).tril()  # with zeros, as that of A has at first
        optimizer.step()
        if not matrix.isfinite().all():
            raise ValueError("weights that are not finite where gradients are 0, as by eps: 0")
        optimizer.step()  # some options count from the second one on
        load_state(optimizer, state_tensors(optimizer))  # as a resume does
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
    vector = nn.Parameter(torch.zeros(2, device=device))
    try:
        from_groups([{"params": [vector], "ratio": 1.0}], train)
    except ValueError:
        raise ConfigError(
            f"`train.optimizer: {train.optimizer}` trains matrices alone (got lora_bias, which has "
            "vectors too); use adamw, or leave it out"
        ) from None


# --- made new for each link ---


def make_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.Optimizer:
    """Return a new optimizer for a link.

    Factor B's rate is `lora_plus_ratio` times A's (arXiv 2402.12354).
    """
    groups = [
        {"params": adapter.named_factor("A"), "ratio": 1.0},
        {"params": adapter.named_factor("B"), "ratio": config.lora_plus_ratio},
    ]
    return from_groups(groups, config)


def from_groups(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return entry(OPTIMIZERS, "train.optimizer", config.optimizer)(groups, config)


# --- its state, on disk and over knots ---


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as flat tensors, ``"<parameter>.<key>"``.

    What changes in a parameter group is ``"<group>.group:<key>"``. A number becomes a tensor
    without dimensions, its name ends in ``.number``.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # tables that all parameters share are written for each
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
    """Say whether an optimizer begins with what that of the link before held (`take_over`)."""
    return callable(getattr(optimizer, "take_over", None))


def _has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer evaluates other weights than those it steps from (schedule-free)."""
    return callable(getattr(optimizer, "eval", None))


def leave_average(optimizer: torch.optim.Optimizer) -> None:
    """End training: leave the weights to be evaluated and kept, which differ in few optimizers."""
    if _has_average(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


@contextmanager
@torch.no_grad()
def evaluated_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the weights to be evaluated in place for a while; then those it steps from."""
    if not _has_average(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    leave_average(optimizer)
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
