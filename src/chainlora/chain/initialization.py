"""Initialization of a link: the factors that a fresh LoRA starts from.

Random factors come from a generator seeded by (seed, link, module). So all processes draw the same
numbers, whatever the state of their global generators. `link` names the stage and the place within
it (`Chain.begin_stage`), so the links before the stage do not matter. `gradient` uses the loss
gradient (the Frank–Wolfe view of arXiv 2401.04151, Algorithm 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import LIVE, Adapter, Factors, set_factors
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.models.modes import seeded

Backward = Callable[[], object]
"""Runs forward and backward over a few batches and accumulates gradients, without an update."""

# A row of PEFT's Kaiming-uniform A (bound 1/√in) has RMS norm √(in · 1/(3·in)). Rows of
# `gradient` get the same norm, so that a learning rate has the same meaning for every `init`.
_ROW_NORM = 1 / math.sqrt(3)
# Explicit, so that torch's default dtype and device in a script do not change the links.
_HOST: Any = {"dtype": torch.float32, "device": "cpu"}
# Passes of subspace iteration; two find the leading directions if singular values decay.
_SWEEPS = 2


def generator_for(seed: int, link: int | str, module: str) -> torch.Generator:
    """Return a CPU generator that depends only on (seed, link, module)."""
    return seeded(f"{seed}/{link}/{module}")


def random_factors(
    config: LinkConfig, in_features: int, out_features: int, generator: torch.Generator
) -> Factors:
    """Return random A [rank, in] and zero B [out, rank], so that ``B·A = 0``.

    Entries of A: ``gaussian`` draws from N(0, 1/rank²); all others, as ``kaiming``, uniformly from
    ±1/√in. Both are PEFT's.
    """
    rank, shape = config.rank, (config.rank, in_features)
    if config.init == "gaussian":
        drawn = torch.randn(shape, generator=generator, **_HOST) / rank
    else:
        drawn = (torch.rand(shape, generator=generator, **_HOST) * 2 - 1) / math.sqrt(in_features)
    return Factors(drawn, torch.zeros(out_features, rank, **_HOST))


def initialize(adapter: Adapter, seed: int, link: str, backward: Backward | None = None) -> None:
    """Set the initial factors of a fresh adapter, in place, with ``B·A = 0``.

    `link` names the link for the generator: its stage and its place within it.

    Raises ChainError if ``init: gradient`` gets no `backward` or no finite gradient.
    """
    config = adapter.config
    if config.init == "gradient" and backward is None:
        remedy = "pass a callable that runs forward and backward over a few batches"
        raise ChainError("`init: gradient` needs the loss", "no `backward`", remedy)
    for name, layer in adapter.layers.items():
        sides, generator = (layer.in_features, layer.out_features), generator_for(seed, link, name)
        set_factors(adapter, name, random_factors(config, *sides, generator))
    if backward is not None and config.init == "gradient":
        _point_along_gradient(adapter, seed, link, backward)


def _point_along_gradient(adapter: Adapter, seed: int, link: str, backward: Backward) -> None:
    """Set each A to the leading right singular vectors of the loss gradient G, and B to zero.

    Subspace iteration, without forming the dense gradient G [out, in]: LoRA's own gradients are its
    products. With A = 0 the model computes the base's function for any B, and dL/dA = s·Bᵀ·G. With
    B = 0, dL/dB = s·G·Aᵀ.
    """
    rank, layers = adapter.config.rank, adapter.layers
    zero_a = {n: torch.zeros(rank, x.in_features, **_HOST) for n, x in layers.items()}
    zero_b = {n: torch.zeros(x.out_features, rank, **_HOST) for n, x in layers.items()}
    left: dict[str, Tensor] = {}  # [out, rank]
    for name, zeros in zero_b.items():
        generator = generator_for(seed, link, f"{name}/sketch")
        left[name] = _orthonormal(torch.randn(zeros.shape, generator=generator, **_HOST))
    right: dict[str, Tensor] = {}  # [rank, in]
    for sweep in range(_SWEEPS):
        start = {name: Factors(zero_a[name], b) for name, b in left.items()}
        rows = _gradients(adapter, start, "lora_A", backward)
        right = {name: _orthonormal(gradient.T).T for name, gradient in rows.items()}
        if sweep + 1 < _SWEEPS:
            start = {name: Factors(a, zero_b[name]) for name, a in right.items()}
            columns = _gradients(adapter, start, "lora_B", backward)
            left = {name: _orthonormal(gradient) for name, gradient in columns.items()}
    for name, a in right.items():
        set_factors(adapter, name, Factors(a * _ROW_NORM, zero_b[name]))


def _gradients(
    adapter: Adapter, factors: Mapping[str, Factors], factor: str, backward: Backward
) -> dict[str, Tensor]:
    """Return the loss gradient of one factor of every module, at given values of the factors."""
    for name in adapter.layers:
        set_factors(adapter, name, factors[name])
    for parameter in adapter.parameters():
        parameter.grad = None
    backward()
    gradients = {}
    for name, layer in adapter.layers.items():
        weight = getattr(layer, factor)[LIVE].weight
        if weight.grad is None or not torch.isfinite(weight.grad).all():
            rule = "`init: gradient` needs a finite loss gradient in every adapted layer"
            remedy = "`backward` must compute the loss of this model"
            raise ChainError(rule, f"none at {name}", remedy)
        gradients[name] = weight.grad.detach().float().cpu()
    for parameter in adapter.parameters():
        parameter.grad = None
    return gradients


def _orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns that span `columns`, also where these are dependent."""
    return torch.linalg.qr(columns.double()).Q.float()
