"""EWC (arXiv 1612.00796, equation 3), a plug-in: one file that adds a way to learn stages in turn.

One LoRA goes on, and λ/2 Σ_k F_k (θ − θ_k)² holds it near where each stage k has left it. F_k is
the diagonal of the Fisher information: the mean over rows of the squared gradient of a row's
log-likelihood. All stages before are in two sums, Σ F_k and Σ F_k θ_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from chainlora import Link
from chainlora_lab.ways import REGULARISERS
from chainlora_lab.ways.regularisers import Regulariser, Tensors


class EWC(Regulariser):
    """Elastic weight consolidation; `penalty` is λ."""

    def __init__(self, penalty: float = 1e4) -> None:
        self.strength = penalty

    def remember(
        self, memory: Tensors, parameters: Tensors, rows: Iterable[Tensors]
    ) -> dict[str, Tensor]:
        """Add the Fisher information of the stage that ended to the two sums."""
        squares, count = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0
        for gradients in rows:
            count += 1
            for name, gradient in gradients.items():
                squares[name] += gradient.square()
        found = {}
        for name, theta in parameters.items():
            fisher = squares[name] / count
            found[f"F/{name}"] = memory.get(f"F/{name}", 0) + fisher
            found[f"W/{name}"] = memory.get(f"W/{name}", 0) + fisher * theta
        return found

    def penalty(
        self, parameters: Tensors, memory: Tensors, links: Sequence[Link]
    ) -> Tensor | float:
        """Return λ/2 Σ F_k (θ − θ_k)², but for a constant."""
        if not memory:
            return 0.0
        terms = [
            (memory[f"F/{n}"] * p.square() / 2 - memory[f"W/{n}"] * p).sum()
            for n, p in parameters.items()
        ]
        return self.strength * torch.stack(terms).sum()


REGULARISERS["ewc"] = EWC
