"""Initialization of a link: the factors that a fresh LoRA starts from.

Random ones are drawn from a generator seeded by (seed, link, module), so every process draws the
same numbers whatever its own generator has consumed. The link is named by its stage and its place
there (`Chain.begin_stage`), so it does not matter which links came before. Data-driven ones look at
the model: `gradient` at the loss gradient (the Frank–Wolfe reading of arXiv 2401.04151, Algorithm
2), `pissa` at the weight itself (arXiv 2404.02948). `orthogonal` looks at the earlier links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import LIVE, Adapter, Factors, base_layer, dequantized, set_factors
from chainlora.chain.link import Link
from chainlora.chain.low_rank import randomized_svd, row_basis
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.models.modes import seeded

Backward = Callable[[], object]
"""Runs forward and backward over a few batches, adding up gradients in the trained parameters;
makes no update."""

# A row of PEFT's Kaiming-uniform A (bound 1/√in) has expected norm √(in · 1/(3·in)); a directed row
# gets the same one, so that the learning rate means the same for every start.
_ROW_NORM = 1 / math.sqrt(3)
# Whatever torch's defaults are in a script, so that links are the same.
_HOST: Any = {"dtype": torch.float32, "device": "cpu"}
# The shorter side of a weight that PiSSA decomposes whole: 16 s for 4096 × 4096 on one CPU core,
# 0.1 s for 576 × 1536. A randomised decomposition misses much of a flat spectrum.
_DECOMPOSED = 4096
# Passes of subspace iteration; two fix the leading directions of a decaying spectrum.
_SWEEPS = 2


def generator_for(seed: int, link: int | str, module: str) -> torch.Generator:
    """Return a CPU generator that depends on (seed, link, module) alone."""
    return seeded(f"{seed}/{link}/{module}")


def random_factors(
    config: LinkConfig, in_features: int, out_features: int, generator: torch.Generator
) -> Factors:
    """Draw A (rank × in) and set B (out × rank) to zero, so that ``B·A = 0``.

    `gaussian` is N(0, 1/rank²) and `kaiming` uniform in ±1/√in, both as in PEFT.
    """
    rank, shape = config.rank, (config.rank, in_features)
    if config.init == "gaussian":
        drawn = torch.randn(shape, generator=generator, **_HOST) / rank
    else:
        drawn = (torch.rand(shape, generator=generator, **_HOST) * 2 - 1) / math.sqrt(in_features)
    return Factors(drawn, torch.zeros(out_features, rank, **_HOST))


def principal_factors(config: LinkConfig, weight: Tensor, generator: torch.Generator) -> Factors:
    """PiSSA: split the top singular directions of `weight` (out × in, float32) evenly over B and A.

    ``scaling · B · A`` is the best rank-r approximation of the weight, up to `_DECOMPOSED` rows or
    columns; above it is near the best (`randomized_svd`). The caller takes it out of the base.
    """
    if min(weight.shape) <= _DECOMPOSED:
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
    """Give a fresh adapter its initial factors, in place.

    Returns the factors whose product is *not* zero (PiSSA), by module; the caller must subtract
    them from the base so that the function is unchanged. Empty for every other initialization.
    `link` is what it is drawn by; of the links `earlier`, `orthogonal` avoids those that are on.
    """
    config = adapter.config
    if config.init == "gradient" and backward is None:
        raise ChainError(
            "`init: gradient` needs the loss (got no `backward`); pass a callable that runs "
            "forward and backward over a few batches"
        )
    start = {}
    for name, layer in adapter.layers.items():
        generator = generator_for(seed, link, name)
        if config.init == "pissa":
            start[name] = principal_factors(config, dequantized(base_layer(layer)), generator)
        else:
            sides = layer.in_features, layer.out_features
            start[name] = random_factors(config, *sides, generator)
        if config.init == "orthogonal":
            start[name] = replace(start[name], a=_away_from(earlier, name, start[name].a))
    for name, factors in start.items():
        set_factors(adapter, name, factors)
    if backward is not None and config.init == "gradient":
        _point_along_gradient(adapter, seed, link, backward)
    return start if config.init == "pissa" else {}


def _away_from(earlier: Sequence[Link], name: str, a: Tensor) -> Tensor:
    """Turn the rows of A [rank, in] out of what earlier links read, their norms unchanged.

    Their inputs ``A_j·x`` are then no inputs of the new link (in the spirit of O-LoRA, arXiv
    2310.14152, which penalises the overlap instead).
    """
    links = [link for link in earlier if link.strength and name in link.factors]
    if not links:
        return a
    taken = row_basis(torch.cat([link.factors[name].a for link in links]))
    if len(taken) + len(a) > a.shape[1]:
        raise ChainError(
            f"`init: orthogonal` needs directions that earlier links leave free (got {len(taken)} "
            f"of {a.shape[1]} taken at {name}, for rank {len(a)}); lower the rank, or use init: "
            "kaiming"
        )
    rows = a.double()
    free = rows - (rows @ taken.T) @ taken
    return (free * (rows.norm(dim=1) / free.norm(dim=1)).unsqueeze(1)).float()


def _point_along_gradient(adapter: Adapter, seed: int, link: str, backward: Backward) -> None:
    """Let each A span the top right singular directions of the loss gradient G, with B = 0.

    Subspace iteration in which LoRA's own gradients are the products with G, so the dense gradient
    is never formed: with A = 0 the function is the base's whatever B is and dL/dA = s·Bᵀ·G; with B
    = 0, dL/dB = s·G·Aᵀ.
    """
    rank, layers = adapter.config.rank, adapter.layers

    def with_zero_b(name: str, a: Tensor) -> Factors:
        return Factors(a, torch.zeros(layers[name].out_features, rank, **_HOST))

    left: dict[str, Tensor] = {}  # out × rank
    for name, layer in layers.items():
        generator = generator_for(seed, link, f"{name}/sketch")
        left[name] = _orthonormal(
            torch.randn(layer.out_features, rank, generator=generator, **_HOST)
        )
    right: dict[str, Tensor] = {}  # rank × in
    for sweep in range(_SWEEPS):
        start = {
            name: Factors(torch.zeros(rank, layers[name].in_features, **_HOST), b)
            for name, b in left.items()
        }
        rows = _gradients(adapter, start, "lora_A", backward)
        right = {name: _orthonormal(gradient.T).T for name, gradient in rows.items()}
        if sweep + 1 < _SWEEPS:
            start = {name: with_zero_b(name, a) for name, a in right.items()}
            columns = _gradients(adapter, start, "lora_B", backward)
            left = {name: _orthonormal(gradient) for name, gradient in columns.items()}
    for name, a in right.items():
        set_factors(adapter, name, with_zero_b(name, a * _ROW_NORM))


def _gradients(
    adapter: Adapter, factors: Mapping[str, Factors], factor: str, backward: Backward
) -> dict[str, Tensor]:
    """Return the loss gradient of one factor of every module, where the factors are as given."""
    weights: dict[str, nn.Parameter] = {}
    for name, layer in adapter.layers.items():
        set_factors(adapter, name, factors[name])
        weights[name] = getattr(layer, factor)[LIVE].weight
    for parameter in adapter.parameters():
        parameter.grad = None
    backward()
    gradients = {}
    for name, weight in weights.items():
        if weight.grad is None or not torch.isfinite(weight.grad).all():
            raise ChainError(
                "`init: gradient` needs a finite loss gradient in every adapted layer (got none "
                f"at {name}); check that `backward` runs the loss of this model"
            )
        gradients[name] = weight.grad.detach().float().cpu()
        weight.grad = None
    for parameter in adapter.parameters():
        parameter.grad = None
    return gradients


def _orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns with the span of `columns`, completed where they are dependent."""
    return torch.linalg.qr(columns.double()).Q.float()
