"""Reset a trainer's optimizer and schedule at a knot.

A trainer makes both objects once, before the first step. So at a knot the optimizer gets the
parameters of the next link, and its state is cleared. An optimizer that stores all state by
parameter is then equal to a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from chainlora.errors import ChainError, ConfigError
from chainlora.knots.moments import unknown_moments
from chainlora.training.processes import Processes

# Keys of parameter groups in optimizers that store weights, which a knot would not change
# (schedule-free, Prodigy, D-Adapt), and the key of a step count.
_WEIGHTS = ("k", "d", "weight_sum", "scheduled_lr")
_COUNT = ("step",)
# Optimizers whose moments are known (`knots.moments.MOMENTS`).
_CARRIED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class Trained:
    """The parameters of a model's chain that a trainer's optimizer trains and DDP synchronises.

    Make it before the chain is put on the model, because an optimizer can hold the earlier
    parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = named_parameters(model)
        self._groups: list[list[str]] = []  # names of the parameters in each group
        self._held: dict[nn.Parameter, str] = {}  # by DDP

    def take_over(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        """Record the parameter groups of the optimizer, and make it train the live link.

        Raises ConfigError unless it trains exactly the model's LoRA.
        """
        if not self._groups:
            names = self._before | {p: name for name, p in self._model.named_parameters()}
            groups = [group["params"] for group in optimizer.param_groups]
            group_names = [[names.get(p, "") for p in group] for group in groups]
            trained = set(named_parameters(self._model).values())
            given = {name for group in group_names for name in group}
            if given != trained:
                odd = min(given ^ trained) or "a parameter that is not the model's"
                raise ConfigError(
                    "the optimizer must train exactly the parameters of the LoRA (got a difference "
                    f"at {odd}); let the trainer make it, or give it all trainable parameters"
                )
            self._groups = group_names
        self._held = self._held or named_parameters(self._model)
        self._before = {}
        self.follow(optimizer, processes)

    def follow(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        """Make an optimizer train the live link; state is moved to the new parameters.

        Raises ChainError if DDP holds other parameters.
        """
        current = dict(self._model.named_parameters())
        for group, names in zip(optimizer.param_groups, self._groups, strict=True):
            old, group["params"] = group["params"], [current[name] for name in names]
            for before, after in zip(old, group["params"], strict=True):
                if before is not after and before in optimizer.state:
                    optimizer.state[after] = optimizer.state.pop(before)
        trained = named_parameters(self._model)
        if processes.count > 1 and self._held.keys() != trained.keys():
            raise ChainError(
                f"{processes.count} processes must keep training the same parameters (got others "
                f"at {min(trained.values())}); begin with a new model, callback and trainer"
            )


def named_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def check_restart(optimizer: torch.optim.Optimizer, *, is_reset: bool) -> None:
    """Raise ConfigError for an optimizer that cannot pass a knot.

    With `is_reset`, clearing its state must make it equal to a new one. Otherwise its state must
    not contain weights, which would pull the next link towards the previous one.
    """
    for group in optimizer.param_groups:
        kept = [key for key in _WEIGHTS + _COUNT * is_reset if key in group]
        if kept:
            raise ConfigError(
                "to pass a knot, an optimizer must store only moments, by parameter",
                f"{kept[0]!r} in the groups of {_name(optimizer)}",
                "use another, such as adamw_torch",
            )


def check_carried(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer whose moments cannot be carried over soft knots."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, _CARRIED) or unknown_moments(inner):
        raise ConfigError(
            "soft knots can carry the moments of AdamW, and of Adam and SGD without weight_decay "
            f"(got {_name(optimizer)}); set moments: new in `knots`, or use AdamW"
        )


def rate_factor(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate as a share of the schedule's highest rate."""
    group = optimizer.param_groups[0]
    highest = group.get("initial_lr", group["lr"])  # schedules store it there
    return group["lr"] / highest if highest else 0.0


def _name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def check_schedule(scheduler: Any, args: TrainingArguments, num_steps: int) -> None:
    """Raise ConfigError for a schedule that cannot restart at a knot.

    It must be the schedule of the trainer's arguments, because each link gets that one.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            "`restart_schedule` needs a schedule that is a function of the step (got "
            f"{type(scheduler).__name__}); use another lr_scheduler_type, or restart_schedule=False"
        )
    factor = _factor(args, num_steps, scheduler.optimizer.defaults["lr"])
    steps = range(0, num_steps, max(num_steps // 50, 1))
    if any(f(step) != factor(step) for f in scheduler.lr_lambdas for step in steps):
        name = getattr(args.lr_scheduler_type, "value", "")
        raise ConfigError(
            "`restart_schedule` can only restart the schedule of the trainer's arguments",
            f"a schedule other than lr_scheduler_type={name!r}",
            "set lr_scheduler_type, or restart_schedule=False",
        )


def restart_schedule(
    scheduler: LambdaLR, args: TrainingArguments, first: int, num_steps: int
) -> None:
    """Run the whole schedule, including warm-up, in the link that begins at step `first`.

    A schedule can lag behind the steps: it does not count steps that a gradient scaler skips, and
    it is new if the checkpoint has no schedule.
    """
    scheduler.last_epoch = max(scheduler.last_epoch, first)
    factor = _factor(args, num_steps, scheduler.optimizer.defaults["lr"])

    def of_link(step: int) -> float:
        return factor(step - first)

    scheduler.lr_lambdas = [of_link] * len(scheduler.base_lrs)
    rates = [base * of_link(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _factor(args: TrainingArguments, num_steps: int, lr: float) -> Callable[[int], float]:
    """Return the schedule of the trainer for a run of `num_steps` steps.

    `lr` is the optimizer's rate: some schedules end at a given rate (`min_lr`, `lr_end`).
    """
    options = args.lr_scheduler_kwargs
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr),
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options if isinstance(options, dict) else None,
    )
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor
