"""FeatCal (arXiv 2605.13030): a merged model that is calibrated layer by layer, in closed form.

W = (Σ G_j/‖G_j‖ + λI)⁻¹ (Σ C_j/‖G_j‖ W_jᵀ + λ Aᵀ), G_j = XᵀX/n, C_j = Xᵀ(α X_j + (1 − α) X)/n,
A = W_0 + ρ (merged − W_0); X are the inputs of a module in the merged model on rows of model j,
X_j those in model j. Norms are Frobenius'. The merged model is task arithmetic; X are inputs in a
layer before it is calibrated, behind layers that are. As in the authors' code (the equations agree
to 2e-7), but norms of layers stay as they are: no stage trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.layerwise import Batch, Layers, run
from chainlora_lab.ways.merging import Links, Rows, _inputs, added, modules_of, sums, weight_of

SCALE, FLOOR = 0.3, 1e-8  # of task arithmetic, and of the authors' equations


@torch.no_grad()
def featcal(
    model: Any, links: Links, rows: Rows, *, ridge: float, anchor: float, alpha: float
) -> dict[str, Tensor]:
    """Return the updates; `model` is the base, and is that again afterwards."""
    modules, found = modules_of(links), dict[str, Tensor]()
    layers = Layers(model, [*modules])
    own = {task: [layers.enter([row]) for row in some] for task, some in rows.items()}
    merged = {task: [layers.enter([row]) for row in some] for task, some in rows.items()}
    for place, (path, block) in enumerate(layers.blocks.items()):
        inner = {name: shape for name, shape in modules.items() if name.startswith(f"{path}.")}
        updates = {task: sums(of_task, inner) for task, of_task in links.items()}
        total = {name: SCALE * sum(each[name] for each in updates.values()) for name in inner}
        equations = {name: Equations(ridge, alpha) for name in inner}
        for task in rows:
            x = _seen(model, total, [*inner], block, place, merged[task])
            x_own = _seen(model, updates[task], [*inner], block, place, own[task], go_on=True)
            for name in inner:
                weight = weight_of(model, name) + updates[task][name]
                equations[name].add(x[name], x_own[name], weight)
        for name in inner:
            base = weight_of(model, name)
            found[name] = equations[name].solve(base + anchor * total[name]) - base
        with added(model, {name: found[name] for name in inner}):
            for batches in merged.values():
                for batch in batches:
                    batch.hidden = run(block, batch, place)
    return found


class Equations:
    """The equations of one module."""

    def __init__(self, ridge: float, alpha: float) -> None:
        self.ridge, self.alpha = ridge, alpha
        self.left: Tensor | float = 0.0
        self.right: Tensor | float = 0.0

    def add(self, x: Tensor, x_own: Tensor, weight: Tensor) -> None:
        """Add a model: inputs [tokens, in] in the merged model and in its own, and its weight."""
        gram = (x.T @ x / len(x)).double()
        mixed = self.alpha * x_own + (1 - self.alpha) * x
        cross = (x.T @ mixed / len(x)).double()
        norm = gram.norm().clamp_min(FLOOR)
        self.left = self.left + gram / norm
        self.right = self.right + cross @ weight.T.double() / norm

    def solve(self, anchor: Tensor) -> Tensor:
        """Return the calibrated weight [out, in]."""
        assert isinstance(self.left, Tensor)
        one = torch.eye(len(self.left), dtype=torch.float64)
        left = self.left + (self.ridge + FLOOR) * one
        return torch.linalg.solve(left, self.right + self.ridge * anchor.T.double()).T.float()


def _seen(
    model: Any,
    update: Mapping[str, Tensor],
    names: Sequence[str],
    block: Any,
    place: int,
    batches: Sequence[Batch],
    *,
    go_on: bool = False,
) -> dict[str, Tensor]:
    """Return the inputs of modules in a layer with an update; with `go_on`, pass the layer."""
    with added(model, update), _inputs(model, names) as seen:
        for batch in batches:
            hidden = run(block, batch, place)
            batch.hidden = hidden if go_on else batch.hidden
    return {name: torch.cat(some) for name, some in seen.items()}
