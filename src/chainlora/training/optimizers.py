"""Optimizers: each link gets a new one, without the state of the link before.

An optimizer with a method `take_over` gets that state nevertheless. A factory gets parameter
groups, each with its `ratio` of the learning rate, and the `train` section. `optimizer_options`
override other keys. State that is proportional to a power of the gradients must be listed in
`knots.moments.MOMENTS`, so that soft knots can scale it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import Adapter
from chainlora.config.schema import RunConfig, TrainConfig
from chainlora.errors import ConfigError
from chainlora.knots.moments import unknown_moments
from chainlora.registry import entry, import_optional

WITHOUT_ADAM_KEYS = ("sgd", "lion", "adafactor", "muon")  # they do not read `betas` and `eps`
Groups = list[dict[str, Any]]
Factory = Callable[[Groups, TrainConfig], torch.optim.Optimizer]


def adam_keys(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that all variants of Adam take."""
    return {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _made(kind: Any, groups: Groups, config: TrainConfig, **keys: Any) -> torch.optim.Optimizer:
    """Return an optimizer of a class; `optimizer_options` override `keys`."""
    optimizer: torch.optim.Optimizer = kind(groups, config.lr, **keys | config.optimizer_options)
    return optimizer


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused."""
    return _made(torch.optim.AdamW, groups, config, **adam_keys(config), fused=True)


def sgd(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    keys = {"momentum": 0.9, "weight_decay": config.weight_decay}
    return _made(torch.optim.SGD, groups, config, **keys)


def adafactor(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235): its learning rate is relative to the norm of a factor."""
    return _made(torch.optim.Adafactor, groups, config, weight_decay=config.weight_decay)


def muon(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon (kellerjordan.github.io/posts/muon), in torch 2.9 or later."""
    muon_class: Any = getattr(torch.optim, "Muon", None)
    if muon_class is None:
        rule = "`train.optimizer: muon` needs torch 2.9 or later"
        raise ConfigError(rule, torch.__version__, "upgrade torch, or use adamw")
    return _made(muon_class, groups, config, weight_decay=config.weight_decay)


def schedule_free_adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682), of the package schedulefree."""
    if config.schedule != "constant":
        rule = "`train.optimizer: schedule_free_adamw` averages weights and needs a constant rate"
        raise ConfigError(rule, f"schedule: {config.schedule}", "set train.schedule: constant")
    package = import_optional("schedulefree", f"`train.optimizer: {config.optimizer}`")
    optimizer: Any = _made(package.AdamWScheduleFree, groups, config, **adam_keys(config))
    optimizer.train()
    return optimizer


def adamw_8bit(name: str, groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (arXiv 2110.02861), of the package bitsandbytes."""
    package = import_optional("bitsandbytes.optim", f"`train.optimizer: {config.optimizer}`")
    return _made(getattr(package, name), groups, config, **adam_keys(config))


def lion(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Lion, with its own default betas (0.9, 0.99), not those of `train.betas`."""
    return _made(Lion, groups, config, weight_decay=config.weight_decay)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated first moment (arXiv 2302.06675)."""

    def __init__(
        self,
        groups: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        fast, slow = betas
        if not (0 <= fast < 1 and 0 <= slow < 1):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                moment = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, moment, fast).sign_(), alpha=group["lr"])
                moment.lerp_(p.grad, 1 - slow)


# Factories by the name in `train.optimizer`. Plug-ins add entries (`registry`).
OPTIMIZERS: dict[str, Factory] = {
    "adamw": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "adamw_8bit": partial(adamw_8bit, "AdamW8bit"),
    "paged_adamw_8bit": partial(adamw_8bit, "PagedAdamW8bit"),  # moments are paged to the host
    "lion": lion,
}


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
    if chain.knots is not None and _has_average(optimizer):
        raise ConfigError(
            "soft knots need an optimizer with one set of weights (got train.optimizer: "
            f"{train.optimizer}, which has two: the current ones, and their average); leave "
            "chain.knots out"
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
    return entry(OPTIMIZERS, "train.optimizer", config.optimizer)(groups, config)


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


def _has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer evaluates other weights than the trained ones (schedule-free)."""
    return callable(getattr(optimizer, "eval", None))


def leave_average(optimizer: torch.optim.Optimizer) -> None:
    """Replace the trained weights by the evaluated ones, at the end of a link (schedule-free)."""
    if _has_average(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


@contextmanager
@torch.no_grad()
def evaluated_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Use the evaluated weights inside the context, and restore the trained ones after it."""
    if not _has_average(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    leave_average(optimizer)
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        for parameter, value in zip(parameters, trained, strict=True):
            parameter.copy_(value)
