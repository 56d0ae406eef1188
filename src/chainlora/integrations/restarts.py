"""What becomes of a trainer's optimizer and schedule at a knot.

A trainer makes them once, before the first step, and keeps the objects. So the optimizer is pointed
at the parameters of the next link, and forgets what it knew: for an optimizer that keeps all it
knows by parameter, this is what a new one would be.
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

# Keys of parameter groups by which optimizers tell that they keep weights, which no knot would
# change (schedule-free, Prodigy, D-Adapt); and the key in which some count steps.
_WEIGHTS = ("k", "d", "weight_sum", "scheduled_lr")
_COUNT = ("step",)
# Optimizers whose moments are known (`knots.moments.MOMENTS`).
_CARRIED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class Trained:
    """What a trainer's optimizer trains, and DDP sums the gradients of, in a model's chain.

    Made before the chain is put on the model: an optimizer may hold what was there before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = named_parameters(model)
        self._groups: list[list[str]] = []  # names of what each parameter group trains
        self._held: dict[nn.Parameter, str] = {}  # by DDP

    def take_over(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        """Learn what the optimizer trains, and have it train the live link.

        Raises ConfigError unless that is the model's LoRA and nothing else.
        """
        if not self._groups:
            names = self._before | {p: name for name, p in self._model.named_parameters()}
            groups = [group["params"] for group in optimizer.param_groups]
            found = [[names.get(p, "") for p in group] for group in groups]
            trained = set(named_parameters(self._model).values())
            given = {name for group in found for name in group}
            if given != trained:
                odd = min(given ^ trained) or "a parameter that is not the model's"
                raise ConfigError(
                    "the optimizer must train the LoRA and nothing else (got a difference at "
                    f"{odd}); let the trainer make it, or give it all trainable parameters"
                )
            self._groups = found
        self._held = self._held or named_parameters(self._model)
        self._before = {}
        self.follow(optimizer, processes)

    def follow(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        """Have an optimizer train the live link; its state goes along.

        Raises ChainError where DDP holds other parameters.
        """
        current = dict(self._model.named_parameters())
        for group, names in zip(optimizer.param_groups, self._groups, strict=True):
            old, group["params"] = group["params"], [current[name] for name in names]
            for before, now in zip(old, group["params"], strict=True):
                if before is not now and before in optimizer.state:
                    optimizer.state[now] = optimizer.state.pop(before)
        trained = named_parameters(self._model)
        if processes.count > 1 and self._held.keys() != trained.keys():
            raise ChainError(
                f"{processes.count} processes train the parameters that they began with (got "
                f"others at {min(trained.values())}); begin with a new model, callback and trainer"
            )


def named_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def check_restart(optimizer: torch.optim.Optimizer, *, is_reset: bool) -> None:
    """Raise ConfigError for an optimizer that no knot leaves as it should be.

    With `is_reset` it must be as new when its state is cleared. Otherwise it goes on, and must not
    draw the next link towards the weights of the one before.
    """
    for group in optimizer.param_groups:
        kept = [key for key in _WEIGHTS + _COUNT * is_reset if key in group]
        if kept:
            raise ConfigError(
                "an optimizer must keep moments alone, by parameter, to go over a knot",
                f"{kept[0]!r} in the groups of {_name(optimizer)}",
                "use another, such as adamw_torch",
            )


def check_carried(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer whose moments cannot be carried over soft knots."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, _CARRIED) or unknown_moments(inner):
        raise ConfigError(
            "soft knots carry the moments of Adam, AdamW and SGD, those of Adam and SGD without "
            f"weight_decay (got {_name(optimizer)}); set moments: new in `knots`, or use AdamW"
        )


def rate_factor(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate as a share of the schedule's highest."""
    group = optimizer.param_groups[0]
    highest = group.get("initial_lr", group["lr"])  # a schedule notes it there
    return group["lr"] / highest if highest else 0.0


def _name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def check_schedule(scheduler: Any, args: TrainingArguments, num_steps: int) -> None:
    """Raise ConfigError for a schedule that cannot begin anew at a knot.

    It must be the one that the arguments name, since that is what a link gets.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            "`restart_schedule` needs a schedule that is a function of the step (got "
            f"{type(scheduler).__name__}); use another lr_scheduler_type, or restart_schedule=False"
        )
    factor = _factor(args, num_steps, scheduler.optimizer.defaults["lr"])
    steps = range(0, num_steps, max(num_steps // 50, 1))
    if any(own(step) != factor(step) for own in scheduler.lr_lambdas for step in steps):
        raise ConfigError(
            "`restart_schedule` begins the schedule of the trainer's arguments anew",
            f"another than lr_scheduler_type={getattr(args.lr_scheduler_type, 'value', '')!r}",
            "name it there, or set restart_schedule=False",
        )


def restart_schedule(
    scheduler: LambdaLR, args: TrainingArguments, first: int, num_steps: int
) -> None:
    """Give a link the whole schedule for itself, from step `first` on, warm-up included.

    A schedule may lag behind the steps: it leaves out those that a gradient scaler skips, and is
    new where a checkpoint was saved without it.
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
    """Return the schedule that the trainer would make for a run of `num_steps` steps.

    Some end at a rate (`min_lr`, `lr_end`), as a share of the optimizer's own.
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
