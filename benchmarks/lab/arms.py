"""What is compared: every arm is a LoRA of some rank with knots of some kind, or none.

lora        no knot                             classic     `links`: whole knots, fresh start
soft        `every`, `share` (or `time_constant`, a fraction of the steps)
decay       soft with ``tied: false``: the same shrink, nothing is folded into the weights
balance     soft with ``share: 0``: factors are made equal in norm, nothing else
plus        `b_ratio`: B's rate is so many times A's (LoRA+, arXiv 2402.12354)
relative    `relative: true`: balanced, and each component's step in proportion to its norm
scalora     `scales: scalora`: soft, with the proportions of ScaLoRA's scales (`scalora_scales`)
ema         `ema`: results are those of averaged weights
full        ``rank: 0``: all 35 weights are trained
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from model import MODULES, Stacks, Tiny
from torch import Tensor

from chainlora.chain.initialization import generator_for, random_factors
from chainlora.chain.soft_knot import Balance, balance
from chainlora.config.schema import KnotConfig, LinkConfig, TrainConfig
from chainlora.knots.numbers import spacing
from chainlora.training.schedule import rate_factor


@dataclass(frozen=True)
class Arm:
    """One way to train, without its learning rate."""

    rank: int
    links: int = 1
    every: int | None = None  # steps between soft knots
    share: float | None = None  # that a soft knot ties
    time_constant: float | None = None  # of the soft knots, as a fraction of the steps
    tokens: float | None = None  # the same, in learned tokens a trained parameter
    eighth: bool = False  # eight soft knots, ρ = 0.35
    root: float | None = None  # the same, of so many √steps
    pace: float | None = (
        None  # the same, of so many √(steps · steps that learn a token a parameter)
    )
    tied: bool = True
    fading: bool = False  # shares follow the schedule of the learning rate
    moments: str = "carried"
    scales: str = "balanced"
    b_ratio: float = 1.0
    relative: bool = False
    ema: float | None = None  # time constant, as a fraction of the steps

    def named(self) -> dict[str, Any]:
        """Return the values that are not the defaults: new fields leave old cells valid."""
        return {
            key.name: getattr(self, key.name)
            for key in fields(self)
            if getattr(self, key.name) != key.default
        }

    def soft(self, steps: int, a_step: float) -> tuple[int, float] | None:
        """Return (steps between soft knots, share), or None.

        `a_step` is how many tokens are learned in a step, by trained parameter.
        """
        if self.eighth:
            return steps // 8, 0.65
        taus = [
            (self.time_constant, steps),
            (self.tokens, 1 / a_step),
            (self.root, math.sqrt(steps)),
            (self.pace, math.sqrt(steps / a_step)),
        ]
        tau = next((factor * unit for factor, unit in taus if factor), None)
        if tau is None and self.every is None:
            return None
        soft = KnotConfig(every=self.every, share=self.share, time_constant=tau)
        return spacing(soft, steps, a_step)


class Trained(Protocol):
    """What the loop asks of an arm at work."""

    def stacks(self) -> Stacks:
        """Return the weights of the model as it is now."""

    def step(self, gradients: Stacks, done: int) -> None:
        """Make the optimizer step from dense gradients, and the knot that is due after it."""

    def result(self) -> Stacks:
        """Return the weights to evaluate."""


def make(
    arm: Arm, tiny: Tiny, seed: int, lr: float, steps: int, warmup: int, tokens_a_step: int = 256
) -> Trained:
    """Return an arm at work on a copy of the model's weights."""
    rate = partial(rate_factor, TrainConfig(warmup_steps=warmup), [steps])
    if arm.rank == 0:
        return Full(tiny, lr, rate)
    lora = Lora(arm, tiny, seed, lr, steps, rate, tokens_a_step)
    return lora if arm.ema is None else Averaged(lora, arm.ema * steps)


class Full:
    """Full fine-tuning of the stacks."""

    def __init__(self, tiny: Tiny, lr: float, rate) -> None:
        self.weights = {name: w.clone().requires_grad_() for name, w in tiny.stacks.items()}
        self.optimizer = _adamw([list(self.weights.values())], lr, [1.0])
        self.lr, self.rate = lr, rate

    def stacks(self) -> Stacks:
        """Return the weights of the model as it is now."""
        return {name: w.detach() for name, w in self.weights.items()}

    result = stacks

    def step(self, gradients: Stacks, done: int) -> None:
        """Make the optimizer step."""
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
        _set_rate(self.optimizer, self.lr * self.rate(done))
        self.optimizer.step()


class Lora:
    """Low-rank factors of every linear layer, stacked over layers, and the weights they adapt."""

    def __init__(
        self, arm: Arm, tiny: Tiny, seed: int, lr: float, steps: int, rate, tokens_a_step: int
    ) -> None:
        self.arm, self.tiny, self.seed, self.lr, self.rate = arm, tiny, seed, lr, rate
        self.base = {name: w.clone() for name, w in tiny.stacks.items()}
        self.slices = tiny.slices()
        shapes = [self.rows(self.base, name).shape for name in MODULES]
        trained = arm.rank * sum(layers * (out + inputs) for layers, out, inputs in shapes)
        self.soft = arm.soft(steps, tokens_a_step / trained)
        self.whole = {round(k * steps / arm.links) for k in range(1, arm.links)}
        self.reference: dict[str, Tensor] = {}
        self.link = 0
        self._fresh()

    def _fresh(self) -> None:
        """Start a link as `Chain.extend` does, with a new optimizer."""
        self.a: dict[str, Tensor] = {}  # by module: [layers, rank, in]
        self.b: dict[str, Tensor] = {}  # by module: [layers, out, rank]
        config = LinkConfig(rank=self.arm.rank, alpha=self.arm.rank, init="kaiming")
        for name in MODULES:
            out, inputs = self.rows(self.base, name).shape[1:]
            drawn = []
            for layer in range(self.tiny.shape.layers):
                path = f"model.layers.{layer}.{name}"
                generator = generator_for(self.seed, self.link, path)
                drawn.append(random_factors(config, inputs, out, generator))
            self.a[name] = torch.stack([f.a for f in drawn]).requires_grad_()
            self.b[name] = torch.stack([f.b for f in drawn]).requires_grad_()
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        groups = [list(self.a.values()), list(self.b.values())]
        self.optimizer = _adamw(groups, self.lr, [1.0, self.arm.b_ratio])

    def rows(self, stacks: Stacks, module: str) -> Tensor:
        """Return the view of a module [layers, out, in] in its stack."""
        stack, rows = self.slices[module]
        return stacks[stack][:, rows]

    @torch.no_grad()
    def stacks(self) -> Stacks:
        """Return W + B·A."""
        merged = {name: w.clone() for name, w in self.base.items()}
        for name in MODULES:
            self.rows(merged, name).baddbmm_(self.b[name], self.a[name])
        return merged

    result = stacks

    @torch.no_grad()
    def step(self, gradients: Stacks, done: int) -> None:
        """Make the optimizer step, and the knot that is due after it."""
        for name in MODULES:
            dense = self.rows(gradients, name)
            self.a[name].grad = self.b[name].transpose(1, 2) @ dense
            self.b[name].grad = dense @ self.a[name].transpose(1, 2)
        _set_rate(self.optimizer, self.lr * self.rate(done))
        before = self._snapshot() if self.reference else []
        self.optimizer.step()
        for old, new, factor in before:
            new.copy_(old + (new - old) * factor)
        self._knot(done + 1)

    def _knot(self, done: int) -> None:
        if done in self.whole:
            self.base = self.stacks()
            self.link += 1
            self._fresh()
        elif self.soft and done % self.soft[0] == 0:
            self.tie_share(self.soft[1] * (self.rate(done - 1) if self.arm.fading else 1.0))

    @torch.no_grad()
    def tie_share(self, share: float) -> dict[str, Balance]:
        """Tie a soft knot in every module with the package's own `balance`."""
        scales = {}
        for name in MODULES:
            a, b = self.a[name], self.b[name]
            scale = _balance(a, b, share)
            if self.arm.scales == "scalora":
                scale = scalora_scales(a, b, a.grad, b.grad, scale)
            scales[name] = scale
            if self.arm.tied:
                self.rows(self.base, name).baddbmm_(b * scale.tied.unsqueeze(1), a)
            a.mul_(scale.a.unsqueeze(2))
            b.mul_(scale.b.unsqueeze(1))
        if self.arm.moments == "carried":
            self._carry(scales)
        else:
            self._new_optimizer()
        if self.arm.relative and not self.reference:
            self.reference = {name: self._norms(name) for name in MODULES}
        return scales

    def _carry(self, scales: dict[str, Balance]) -> None:
        """Carry Adam's moments exactly, as `chainlora.training.optimizers.carry_moments` does."""
        for name, scale in scales.items():
            for factor, by in (
                (self.a[name], scale.b[:, :, None]),
                (self.b[name], scale.a[:, None]),
            ):
                state = self.optimizer.state[factor]
                state["exp_avg"].mul_(by)
                state["exp_avg_sq"].mul_(by**2)

    def _norms(self, name: str) -> Tensor:
        """Return √(‖A_i‖·‖B_i‖) [layers, rank]."""
        a = torch.linalg.vector_norm(self.a[name].detach(), dim=2)
        return (a * torch.linalg.vector_norm(self.b[name].detach(), dim=1)).sqrt()

    def _snapshot(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (value, parameter, factor of its step) where steps are relative to norms."""
        kept = []
        for name in MODULES:
            factor = self._norms(name) / self.reference[name]
            kept.append((self.a[name].clone(), self.a[name], factor[:, :, None]))
            kept.append((self.b[name].clone(), self.b[name], factor[:, None]))
        return kept


class Averaged:
    """An arm that is evaluated at an exponential moving average of its weights."""

    def __init__(self, arm: Lora, time_constant: float) -> None:
        self.arm, self.keep = arm, math.exp(-1 / time_constant)
        self.average = arm.stacks()

    def stacks(self) -> Stacks:
        """Return the weights that are trained."""
        return self.arm.stacks()

    def step(self, gradients: Stacks, done: int) -> None:
        """Make the step, and move the average."""
        self.arm.step(gradients, done)
        keep = min(self.keep, (done + 1) / (done + 10))  # a short memory while there is little
        for name, weight in self.arm.stacks().items():
            self.average[name].lerp_(weight, 1 - keep)

    def result(self) -> Stacks:
        """Return the average."""
        return self.average


def _balance(a: Tensor, b: Tensor, share: float) -> Balance:
    """Return the scales [layers, rank] of a soft knot in one module of every layer."""
    one = partial(balance, share=share)
    return Balance(*torch.vmap(lambda a, b: tuple(one(a, b)))(a.detach(), b.detach()))


def scalora_scales(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, balanced: Balance
) -> Balance:
    """Return scales of the same products αβ as `balanced`, in the proportions of ScaLoRA.

    arXiv 2510.23818: with P = ∇A [layers, rank, in], Q = ∇B [layers, out, rank] and Γ = Bᵀ·Q, the
    squared scales of B and A solve [[(BᵀB)∘(PPᵀ), Γ∘Γ], [(Γ∘Γ)ᵀ, (AAᵀ)∘(QᵀQ)]]·x = [‖p‖²; ‖q‖²], up
    to a factor, which is the paper's bound on smoothness. That factor is settled here by the share
    that is tied, so that arms differ in the proportions alone. Where Γ is zero and the rank 1,
    these are the balanced ones. A component whose solution is not positive is balanced.
    """
    rank = a.shape[1]
    gamma = (b.mT @ grad_b).square()
    system = torch.cat(
        [
            torch.cat([(b.mT @ b) * (grad_a @ grad_a.mT), gamma], dim=2),
            torch.cat([gamma.mT, (a @ a.mT) * (grad_b.mT @ grad_b)], dim=2),
        ],
        dim=1,
    ).double()
    right = torch.cat([grad_a.square().sum(2), grad_b.square().sum(1)], dim=1).double()
    scale = system.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()  # gradients are tiny
    system = scale.unsqueeze(2) * system * scale.unsqueeze(1)
    solved = scale * torch.linalg.lstsq(system, (scale * right).unsqueeze(2)).solution.squeeze(2)
    squared_b, squared_a = solved[:, :rank], solved[:, rank:]
    valid = (squared_a > 0) & (squared_b > 0) & solved.isfinite().all(1, keepdim=True)
    product = (balanced.a * balanced.b).double()
    ratio = torch.where(valid, squared_b / squared_a, (balanced.b / balanced.a).double() ** 2)
    alpha, beta = (product / ratio.sqrt()).sqrt(), (product * ratio.sqrt()).sqrt()
    return Balance(alpha.to(a.dtype), beta.to(b.dtype), balanced.tied)


def _adamw(groups: Iterable[list[Tensor]], lr: float, ratios: list[float]) -> torch.optim.AdamW:
    groups = [
        {"params": params, "ratio": ratio} for params, ratio in zip(groups, ratios, strict=True)
    ]
    return torch.optim.AdamW(groups, lr, weight_decay=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
