"""The optimizer of one link: a new one for each, so that it knows nothing of the links before.

A new optimizer is a factory in `OPTIMIZERS`; what of its state is proportional to gradients goes
into `MOMENTS`, so that soft knots can carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import Adapter, live_factors
from chainlora.chain.soft_knot import Balance
from chainlora.config.schema import TrainConfig
from chainlora.errors import ConfigError, nearest
from chainlora.training.schedule import learning_rate_factor

Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]


def _adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    keys: dict[str, Any] = {
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    return torch.optim.AdamW(groups, config.lr, **keys | {"fused": True} | config.optimizer_options)


def _sgd(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    keys: dict[str, Any] = {"momentum": 0.9, "weight_decay": config.weight_decay}
    return torch.optim.SGD(groups, config.lr, **keys | config.optimizer_options)


# By the name in `train.optimizer`. A factory gets parameter groups, each with its `ratio` of the
# learning rate.
OPTIMIZERS: dict[str, Factory] = {"adamw": _adamw, "sgd": _sgd}

# What optimizers keep of past gradients, by the power of the gradient that it is.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError unless the optimizer is known and takes its options."""
    if config.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"`train.optimizer` must be one of {', '.join(sorted(OPTIMIZERS))} "
            f"(got {config.optimizer!r}{nearest(config.optimizer, OPTIMIZERS)})"
        )
    try:
        _make([{"params": [nn.Parameter(torch.zeros(1, 1))], "ratio": 1.0}], config)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"`train.optimizer_options` must suit {config.optimizer} (got "
            f"{dict(config.optimizer_options)}: {reason}); see its documentation"
        ) from None


def make_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.Optimizer:
    """Return a new optimizer for a link.

    Factor B's rate is `lora_plus_ratio` times A's (arXiv 2402.12354).
    """
    groups = [
        {"params": adapter.named_factor("A"), "ratio": 1.0},
        {"params": adapter.named_factor("B"), "ratio": config.lora_plus_ratio},
        {
            "params": [p for module in adapter.extra.values() for p in module.parameters()],
            "ratio": 1.0,
        },
    ]
    return _make([group for group in groups if group["params"]], config)


def full_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of full fine-tuning."""
    return _make([{"params": list(parameters), "ratio": 1.0}], config)


def _make(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.optimizer](groups, config)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as flat tensors, ``"<parameter>.<key>"``.

    A number becomes a float64 tensor without dimensions, ``"<parameter>.<key>.number"``.
    """
    tensors = {}
    for position, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{position}.{key}"] = value.detach().cpu().contiguous()
            elif value is not None:
                number = torch.tensor(value, dtype=torch.float64)
                tensors[f"{position}.{key}.number"] = number
    return tensors


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimizer the state that `state_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        position, key, *number = name.split(".")
        value = tensor.item() if number else tensor
        state.setdefault(int(position), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer, adapter: Adapter, scales: Mapping[str, Balance]
) -> None:
    """Carry an optimizer's moments over a soft knot, in place, exactly.

    Its gradients would have been β times as large for A and α times as large for B (`soft_knot`);
    first moments scale with them, second moments with their square, step counts stay.
    """
    for name, scale in scales.items():
        a, b = live_factors(adapter, name)
        _scale_moments(optimizer.state.get(a, {}), scale.b.unsqueeze(1))
        _scale_moments(optimizer.state.get(b, {}), scale.a)


def _scale_moments(state: Mapping[str, Any], scale: Tensor) -> None:
    for key, power in MOMENTS.items():
        if key in state:
            state[key].mul_(scale**power)


def prune_moments(state: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """ReLoRA's partial reset (arXiv 2307.05695, §3): zero the smallest `fraction` of each moment,
    keep the rest.

    `state` maps ``"<parameter>.<key>"`` to AdamW's tensors, as `store.optimizer_tensors` gives
    them. A first moment is kept only where the second is as well: while B = 0 the gradient of A is
    0, so AdamW would divide what is left of the first by its ``eps`` alone, and the step would have
    no bound.
    """
    pruned = dict(state)
    for name in [name for name in state if name.endswith(".exp_avg_sq")]:
        first = name.removesuffix("_sq")
        kept = _largest(state[name], fraction)
        pruned[name] = state[name] * kept
        pruned[first] = state[first] * (kept & _largest(state[first], fraction))
    return pruned


def _largest(moment: Tensor, fraction: float) -> Tensor:
    """Mark the entries that are left when the smallest `fraction` is pruned."""
    num_pruned = int(fraction * moment.numel())
    if not num_pruned:
        return torch.ones_like(moment, dtype=torch.bool)
    magnitudes = moment.abs()
    return magnitudes > magnitudes.flatten().kthvalue(num_pruned).values


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: TrainConfig, lengths: Sequence[int], step: int
) -> float:
    """Give every group its rate at `step` of a chain of links of `lengths` steps; return the rate
    of factor A."""
    restart = config.restart_warmup_steps
    if restart is None:
        restart = config.warmup_steps if config.restart_schedule else 0
    factor = learning_rate_factor(
        step, lengths, config.schedule, config.warmup_steps, config.restart_schedule, restart
    )
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor * group["ratio"]
    return config.lr * factor
