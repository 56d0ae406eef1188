"""Optimizers of torch and bitsandbytes train, resume to the same bits, and are new at knots."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_model
from helpers import assert_same_links, stop_after
from test_laws import config as link_config
from test_laws import loss_of
from torch import nn

from chainlora import Chain, make_config, train
from chainlora.errors import ConfigError
from chainlora.knots.moments import carry_moments, unknown_moments
from chainlora.training.optimizers import (
    OPTIMIZERS,
    check_optimizer,
    make_optimizer,
)

NAMES = ["adamw", "sgd", "adafactor", "muon", "NAdam", "adamw_8bit", "paged_adamw_8bit"]
NAMES += ["lion_32bit"]
RATES = {"sgd": 0.3, "adafactor": 0.3, "muon": 5e-2}  # the others: that of AdamW
OPTIONS = {name: {"min_8bit_size": 1} for name in ("adamw_8bit", "paged_adamw_8bit")}
CPU = torch.device("cpu")

every_optimizer = pytest.mark.parametrize("name", NAMES)
quiet = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def train_keys(name: str) -> dict:
    return {
        "optimizer": name,
        "optimizer_options": OPTIONS.get(name, {}),
        "lr": RATES.get(name, 1e-2),
        "schedule": "constant",
    }


def config_for(name: str, chain=(), train=()):
    """A config of the optimizer; skips where its package is missing."""
    tree = {"model": "m", "data": {"train": "rows.jsonl"}, "chain": {"ranks": [4], "steps": [1]}}
    tree["train"] = train_keys(name) | dict(train)
    try:
        check_optimizer(make_config(tree), CPU)
    except ConfigError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))
    return make_config(tree | {"chain": tree["chain"] | dict(chain)})


@quiet
@every_optimizer
def test_it_trains_and_is_resumed_to_the_same_bits(name, configure, tmp_path):
    """Killed inside a link, and at a knot: a process that begins a link has a new optimizer."""
    config_for(name)  # skips
    keys = {"chain": {"ranks": [4, 4], "steps": [9, 4]}}
    keys |= {"train": train_keys(name) | {"save_every": 2, "eval_every": 3}}
    whole, killed = (configure(each, **keys) for each in ("whole", "killed"))
    losses: list[float] = []
    train(whole, listener=lambda e: losses.append(e.loss) if e.name == "step" else None)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    for step in (4, 9):
        stop_after(killed, step)
    train(killed, resume=True)
    assert_same_links(tmp_path / "killed", tmp_path / "whole")


@quiet
@every_optimizer
def test_the_first_update_after_a_knot_is_that_of_a_new_optimizer(name):
    config = config_for(name).train
    chain, _ = tuned(config)
    link = chain.tie()
    other = Chain(tiny_model("llama"))
    other.add(link)
    updates = [first_update(each, config) for each in (chain, other)]
    assert all(torch.equal(one, two) for one, two in zip(*updates, strict=True))


def tuned(config, steps: int = 3):
    """A chain with a live link after some steps, and the optimizer."""
    chain = Chain(tiny_model("llama"))
    optimizer = make_optimizer(chain.extend(link_config("llama")), config)
    for _ in range(steps):
        step(chain, optimizer)
    return chain, optimizer


def step(chain, optimizer) -> None:
    loss_of(chain.model).backward()
    optimizer.step()
    optimizer.zero_grad()


def first_update(chain, config) -> list[torch.Tensor]:
    adapter = chain.extend(link_config("llama"))
    optimizer = make_optimizer(adapter, config)
    step(chain, optimizer)
    return [p.detach() for p in adapter.parameters()]


# --- soft knots


@quiet
@every_optimizer
def test_a_soft_knot_carries_the_state_or_is_refused(name):
    """Carried: the state is that of an optimizer whose gradients were scaled from the start."""
    config = config_for(name)
    try:
        check_optimizer(config_for(name, chain={"knots": {"every": 1, "share": 0.3}}), CPU)
    except ConfigError as error:
        if "chain.knots.moments: new" not in str(error):
            raise
        return
    chain, _ = tuned(config.train)
    adapter = chain.live
    scales = chain.tie_share(0.3)
    seen = history(adapter, config.train, None)
    carry_moments(seen, adapter, scales)
    scaled = history(adapter, config.train, scales)
    for one, two in zip(states(seen), states(scaled), strict=True):
        assert one.keys() == two.keys()
        for key in one:  # the same sums in float32, scaled before or after
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_momentum_into_which_weights_decay_is_not_carried(momentum):
    """A weight is scaled as the other factor's gradient is."""
    train = {"weight_decay": 0.1, "optimizer_options": {"momentum": momentum}}
    config = config_for("sgd", chain={"knots": {"every": 1, "share": 0.3}}, train=train)
    refuses = pytest.raises(ConfigError, match=r"got weight_decay in the moments .*moments: new")
    with refuses if momentum else nullcontext():
        check_optimizer(config, CPU)
    parameters = [nn.Parameter(torch.ones(2, 2))]
    for kind in (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam):
        keys = {"weight_decay": 0.1, "decoupled_weight_decay": not momentum}
        assert bool(unknown_moments(kind(parameters, **keys))) == bool(momentum)


def history(adapter, config, scales):
    """An optimizer after some gradients whose squares have rank one, as Adafactor takes them."""
    optimizer = make_optimizer(adapter, config)
    generator = torch.Generator().manual_seed(0)
    patterns = {}
    for _ in range(3):
        size = torch.rand((), generator=generator)
        for name, layer in adapter.layers.items():
            for factor in ("lora_A", "lora_B"):
                p = getattr(layer, factor)["default"].weight
                if (name, factor) not in patterns:
                    rows, columns = (torch.rand(n, generator=generator) for n in p.shape)
                    patterns[name, factor] = torch.outer(rows + 0.1, columns + 0.1)
                sign = torch.randn(p.shape, generator=generator).sign()
                p.grad = size * sign * patterns[name, factor]
                if scales is not None:
                    scale = scales[name]
                    p.grad *= scale.b.unsqueeze(1) if factor == "lora_A" else scale.a
        kept = [p.detach().clone() for p in adapter.parameters()]
        optimizer.step()
        with torch.no_grad():
            for p, value in zip(adapter.parameters(), kept, strict=True):
                p.copy_(value)
    return optimizer


def states(optimizer) -> list[dict[str, torch.Tensor]]:
    found = []
    for state in optimizer.state.values():
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        if {"row_var", "col_var"} <= tensors.keys():
            rows, columns = tensors.pop("row_var"), tensors.pop("col_var")
            tensors["estimate"] = rows * columns / rows.mean()
            tensors["mean"] = columns.mean()
        found.append(tensors)
    return found


# --- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": {"optimizer": "muon"}, "chain": {"lora_bias": True}}, "trains matrices alone"),
        (
            {"train": {"optimizer": "relora"}, "chain": {"ranks": [4, 2], "steps": [1, 1]}},
            r"all ranks must be equal \(got \[4, 2\]\); use adamw",
        ),
        (
            {"train": {"optimizer": "RAdam", "optimizer_options": {"betas": [2.0, 0.9]}}},
            r"must suit RAdam on cpu \(got .*Invalid beta",
        ),
        (
            {"train": {"optimizer": "adafactor", "optimizer_options": {"nesterov": True}}},
            "must suit adafactor",
        ),
        (
            {"train": {"optimizer_options": {"betas": [0.9]}}},
            r"must suit adamw on cpu \(got {'betas': \(0.9,\)}: .*out of range\)",
        ),
        (  # 0 / 0 while B is 0
            {"train": {"optimizer_options": {"eps": 0}}},
            "must suit adamw on cpu .*not finite where gradients are 0",
        ),
        (
            {"train": {"optimizer_options": {"fused": False, "capturable": True}}},
            "must suit adamw on cpu .*capturable",
        ),
        (  # read from the second step on
            {"train": {"optimizer": "sgd", "optimizer_options": {"dampening": "none"}}},
            "must suit sgd on cpu .*dampening",
        ),
        ({"train": {"optimizer": "adafakt"}}, r"class of torch.optim, .*did you mean 'adafactor'"),
        ({"train": {"optimizer": "lion"}}, r"of bitsandbytes, such as adamw_8bit or lion_32bit"),
        ({"train": {"optimizer": "LBFGS"}}, r"must suit LBFGS on cpu .*closure"),
    ],
    ids=str,
)
def test_what_an_optimizer_cannot_do_is_refused_before_training(keys, message):
    tree = {"model": "m", "data": {"train": "rows.jsonl"}}
    tree["chain"] = {"ranks": [4], "steps": [1]} | keys.get("chain", {})
    with pytest.raises(ConfigError, match=message):
        check_optimizer(make_config(tree | {"train": keys["train"]}), CPU)


class Remembering(torch.optim.SGD):
    """One that keeps a list, which a checkpoint cannot hold."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["norms"] = [*self.state[p].get("norms", []), p.norm().item()]
        return super().step(closure)


def test_a_state_that_a_resume_could_not_read_is_refused_before_training(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "remembering", lambda groups, c: Remembering(groups, c.lr))
    with pytest.raises(ConfigError, match=r"must suit remembering on cpu .*2 elements"):
        check_optimizer(config_for("remembering"), CPU)
