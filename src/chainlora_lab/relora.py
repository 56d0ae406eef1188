"""ReLoRA's optimizer (arXiv 2307.05695, section 3), a plug-in: name it by `plugins` of a config.

At a knot most of the optimizer's moments are set to 0, and the rate rises from 0 again: with
`schedule: cosine`, the jagged cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chainlora.config.schema import TrainConfig
from chainlora.training.optimizers import OPTIMIZERS, Groups, adam_keys, load_state


class ReLoRA(torch.optim.AdamW):
    """AdamW that takes over moments of the link before, the smallest share `prune` set to 0.

    The first `rise` steps of such a link have a rate that rises to the schedule's.
    """

    def __init__(
        self, groups: Groups, lr: float, *, prune: float = 0.99, rise: int = 0, **keys: Any
    ) -> None:
        super().__init__(groups, lr, **keys)
        self.prune, self.rise = prune, rise
        for group in self.param_groups:
            group["risen"] = rise  # in a group, so that checkpoints have it

    def take_over(self, before: Mapping[str, Tensor]) -> None:
        """Begin with the state of the link before, as `state_tensors` gave it."""
        load_state(self, prune_moments(before, self.prune))
        for group in self.param_groups:
            group["risen"] = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step, at the rate that the loop has set or, after a knot, at a share of it."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            if group["risen"] < self.rise:
                group["lr"] *= group["risen"] / self.rise
                group["risen"] += 1
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


def prune_moments(state: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Set the smallest `share` of each moment to 0.

    A first moment is kept only where the second is as well: while B = 0 the gradient of A is 0, so
    AdamW would divide what is left of the first by its ``eps`` alone, and the step would have no
    bound.
    """
    pruned = dict(state)
    for name in [name for name in state if name.endswith(".exp_avg_sq")]:
        first = name.removesuffix("_sq")
        kept = _largest(state[name], share)
        pruned[name] = state[name] * kept
        pruned[first] = state[first] * (kept & _largest(state[first], share))
    return pruned


def _largest(moment: Tensor, share: float) -> Tensor:
    """Mark the entries that are left when the smallest `share` is pruned."""
    num_pruned = int(share * moment.numel())
    if not num_pruned:
        return torch.ones_like(moment, dtype=torch.bool)
    magnitudes = moment.abs()
    return magnitudes > magnitudes.flatten().kthvalue(num_pruned).values


def relora(groups: Groups, config: TrainConfig) -> ReLoRA:
    """Make it; `train.optimizer_options` may have `prune` and `rise` too."""
    keys = adam_keys(config) | {"fused": True}
    return ReLoRA(groups, config.lr, **keys | config.optimizer_options)


OPTIMIZERS["relora"] = relora
