"""Knots by the public verbs: tie, extend, fused layers, a new optimizer; each link with factors
that changed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measuring import peak_mb

from chainlora import Chain, load_model
from chainlora.config.schema import LinkConfig, TrainConfig
from chainlora.training.loop import make_optimizer
from chainlora_fast.linear_layers import LoraLayers

NUM_KNOTS = 5


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Tie and extend, several times."""
    model, _ = load_model(spec["model"], getattr(torch, spec["dtype"]))
    chain = Chain(model, seed=spec["seed"], checkpoint=spec["model"])
    link = LinkConfig(rank=spec["rank"], alpha=spec["alpha"], target_modules=spec["targets"])

    def knot(_: torch.optim.Optimizer) -> torch.optim.Optimizer:
        chain.tie()
        return _extend(chain, link)

    return measured(_extend(chain, link), knot)


def measured(
    optimizer: torch.optim.Optimizer,
    knot: Callable[[torch.optim.Optimizer], torch.optim.Optimizer],
) -> dict[str, Any]:
    """Tie several knots, each after a step; `knot` returns the optimizer of the next link."""
    seconds: list[float] = []
    before = 0.0
    for _ in range(NUM_KNOTS):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before = before or peak_mb()
        began = time.perf_counter()
        optimizer = knot(optimizer)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds_per_knot": statistics.median(seconds),
        "knot_seconds": [round(s, 4) for s in seconds],
        "peak_before_first_knot_mb": before,
        "peak_after_knots_mb": peak_mb(),
    }


def _extend(chain: Chain, link: Any) -> torch.optim.Optimizer:
    adapter = chain.extend(link)
    LoraLayers().adapt(list(adapter.layers.values()))
    return make_optimizer(adapter, TrainConfig())
