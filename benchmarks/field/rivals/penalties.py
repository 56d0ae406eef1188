"""What O-LoRA and EWC add to the loss of a task.

O-LoRA (arXiv 2310.14152, equations 6 to 8): a new LoRA for each task, the earlier ones frozen, with
λ Σ_i |A_i A_tᵀ|, the sum of the absolute values as in the authors' code.

EWC (arXiv 1612.00796, equation 3): one set of parameters, λ/2 Σ_k F_k (θ − θ_k)², F_k the diagonal
of the Fisher information of task k: the mean over rows of the squared gradient of a row's
log-likelihood. All tasks before are in two sums, Σ F_k and Σ F_k θ_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(earlier: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Return Σ |A_i A_tᵀ| over modules: earlier A (all ranks × in), new A (rank × in) of each."""
    pairs = zip(earlier, new, strict=True)
    return torch.stack([(old @ a.T).abs().sum() for old, a in pairs]).sum()


class Anchors:
    """Tasks that are over, by their Fisher information: what holds parameters where they were."""

    def __init__(self, fisher: Sequence[Tensor] = (), weighted: Sequence[Tensor] = ()) -> None:
        self.fisher, self.weighted = [*fisher], [*weighted]  # Σ F_k, Σ F_k θ_k

    def add(self, fisher: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Add a task that ended at these parameters."""
        weighted = [f * p.detach() for f, p in zip(fisher, parameters, strict=True)]
        if not self.fisher:
            self.fisher, self.weighted = [*fisher], weighted
            return
        self.fisher = [a + b for a, b in zip(self.fisher, fisher, strict=True)]
        self.weighted = [a + b for a, b in zip(self.weighted, weighted, strict=True)]

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of ½ Σ F_k (θ − θ_k)² for each parameter."""
        sums = zip(self.fisher, self.weighted, parameters, strict=True)
        return [f * p.detach() - w for f, w, p in sums]
