"""Initialization of a link: the factors that a fresh LoRA starts from.

Random factors come from a generator seeded by (seed, link, module). So all processes draw the same
numbers, whatever the state of their global generators. `link` names the stage and the place within
it (`Chain.begin_stage`), so the links before the stage do not matter. Three kinds use more than
random numbers: `gradient` the loss gradient (the Frank–Wolfe view of arXiv 2401.04151, Algorithm
2), `pissa` the weight (arXiv 2404.02948), `orthogonal` the earlier links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import LIVE, Adapter, Factors, base_layer, dequantized, set_factors
from chainlora.chain.link import Link
from chainlora.chain.low_rank import randomized_svd, row_basis
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
# Longest shorter side for a full SVD in PiSSA: 16 s for 4096 × 4096 on one CPU core, 0.1 s for
# 576 × 1536. A randomized SVD is inaccurate if singular values decay slowly.
_MOST_FOR_SVD = 4096
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


def principal_factors(config: LinkConfig, weight: Tensor, generator: torch.Generator) -> Factors:
    """Return PiSSA's factors (arXiv 2404.02948): the leading singular triplets of a weight.

    ``scaling · B · A`` is the best rank-r approximation of `weight` [out, in], float32; A and B
    share the singular values evenly. Beyond `_MOST_FOR_SVD` it is close to the best
    (`randomized_svd`). The caller must subtract it from the base.
    """
    if min(weight.shape) <= _MOST_FOR_SVD:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = randomized_svd(weight, config.rank + 8, generator.initial_seed())
        vh = v.T
    root = (s[: config.rank] / config.scaling).sqrt()
    a, b = root.unsqueeze(1) * vh[: config.rank], u[:, : config.rank] * root
    return Factors(a.contiguous(), b.contiguous())


def initialize(
    adapter: Adapter,
    seed: int,
    link: str,
    backward: Backward | None = None,
    earlier: Sequence[Link] = (),
) -> dict[str, Factors]:
    """Set the initial factors of a fresh adapter, in place.

    `link` names the link for the generator: its stage and its place within it. ``init: orthogonal``
    avoids the `earlier` links that are switched on.

    Returns:
        By module, the factors whose product is *not* zero (PiSSA): the caller must subtract them
        from the base to keep the function. Empty for every other initialization.

    Raises:
        ChainError: ``init: gradient`` gets no `backward` or no finite gradient, or earlier links
            leave too few free directions for ``init: orthogonal``.
    """
    config = adapter.config
    if config.init == "gradient" and backward is None:
        remedy = "pass a callable that runs forward and backward over a few batches"
        raise ChainError("`init: gradient` needs the loss", "no `backward`", remedy)
    start = {}
    for name, layer in adapter.layers.items():
        generator = generator_for(seed, link, name)
        if config.init == "pissa":
            start[name] = principal_factors(config, dequantized(base_layer(layer)), generator)
        else:
            sides = layer.in_features, layer.out_features
            start[name] = random_factors(config, *sides, generator)
        if config.init == "orthogonal":
            start[name] = replace(start[name], a=_orthogonal_to(earlier, name, start[name].a))
    for name, factors in start.items():
        set_factors(adapter, name, factors)
    if backward is not None and config.init == "gradient":
        _point_along_gradient(adapter, seed, link, backward)
    return start if config.init == "pissa" else {}


def _orthogonal_to(earlier: Sequence[Link], name: str, a: Tensor) -> Tensor:
    """Project the rows of A [rank, in] orthogonal to the rows of earlier links; keep their norms.

    The new link then reads other input directions than earlier links. O-LoRA (arXiv 2310.14152)
    penalises the overlap during training instead.
    """
    links = [link for link in earlier if link.strength and name in link.factors]
    if not links:
        return a
    taken = row_basis(torch.cat([link.factors[name].a for link in links]))
    if len(taken) + len(a) > a.shape[1]:
        rule = f"`init: orthogonal` needs {len(a)} input directions that no earlier link uses"
        got = f"{len(taken)} of {a.shape[1]} in use at {name}"
        raise ChainError(rule, got, "begin again with lower ranks, or use init: kaiming")
    rows = a.double()
    free = rows - (rows @ taken.T) @ taken
    return (free * (rows.norm(dim=1) / free.norm(dim=1)).unsqueeze(1)).float()


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
