"""Updates merged without data: their mean (task arithmetic, arXiv 2212.04089), TIES (2306.01708).

TIES is PEFT's: of each update the largest entries by magnitude, the sign of the larger total, and
the mean of the entries of that sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import ties as merge_ties
from torch import Tensor

from chainlora import Link

DENSITY = 0.2  # of the paper


def mean(links: Sequence[Link], scale: float) -> dict[str, Tensor]:
    """Return the mean of updates, times a scale."""
    share = scale / len(links)
    return {
        name: torch.stack([link.delta_weight(name) for link in links]).sum(0) * share
        for name in links[0].factors
    }


def ties(links: Sequence[Link], scale: float) -> dict[str, Tensor]:
    """Return updates merged by TIES, times a scale, module by module."""
    weights = torch.full((len(links),), scale)
    return {
        name: merge_ties([link.delta_weight(name) for link in links], weights, DENSITY)
        for name in links[0].factors
    }
