"""What is added to the loss of a LoRA that learns stage after stage: by default nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from chainlora import Link

Tensors = Mapping[str, Tensor]


class Regulariser:
    """One LoRA that goes on from stage to stage; subclasses hold it back.

    `parameters` are those of the LoRA that is trained, as ``A/MODULE`` (rank × in) and ``B/MODULE``
    (out × rank). With `grows`, each stage has a new LoRA on the frozen `links` of those before, and
    nothing is remembered but these.
    """

    grows = False

    def remember(
        self, memory: Tensors, parameters: Tensors, rows: Iterable[Tensors]
    ) -> dict[str, Tensor]:
        """Return what is known of all stages so far, from what was known before the last one.

        Called between two stages. `rows` has, for each kept row of the stage that ended, the
        gradient of its loss, summed over its terms: minus that of its log-likelihood.
        """
        return {}

    def penalty(
        self, parameters: Tensors, memory: Tensors, links: Sequence[Link]
    ) -> Tensor | float:
        """Return what is added to the mean loss of each step: differentiable, or a number."""
        return 0.0


class OLoRA(Regulariser):
    """O-LoRA (arXiv 2310.14152, equations 6 to 8): λ Σ_i |A_i A_tᵀ| holds a new LoRA apart from
    those before; the sum of the absolute values, as in the authors' code."""

    grows = True

    def __init__(self, orthogonal: float = 0.5) -> None:
        self.orthogonal = orthogonal

    def penalty(
        self, parameters: Tensors, memory: Tensors, links: Sequence[Link]
    ) -> Tensor | float:
        earlier: dict[str, list[Tensor]] = {}
        for link in links:
            for name in (n for n in link.factors if f"A/{n}" in parameters):
                earlier.setdefault(name, []).append(link.factors[name].a)
        if not earlier:
            return 0.0
        new = [parameters[f"A/{name}"] for name in earlier]
        return self.orthogonal * orthogonality([torch.cat(a) for a in earlier.values()], new)


def orthogonality(earlier: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Return Σ |A_i A_tᵀ| over modules: earlier A (all ranks × in), new A (rank × in) of each."""
    pairs = zip(earlier, new, strict=True)
    return torch.stack([(old.to(a) @ a.T).abs().sum() for old, a in pairs]).sum()
