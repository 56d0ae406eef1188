"""A router over the stages' own models: the nearest centroid on the base's hidden states.

Of each task, the mean over its kept rows of the hidden states behind one layer, each the mean over
the tokens of a prompt; a prompt goes to the task of largest cosine. Kin: LoraRetriever (arXiv
2402.09997) with the base as encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def nearest(
    features: Callable[[Sequence[Sequence[int]]], Tensor],
    kept: Mapping[str, Sequence[Sequence[int]]],
) -> Callable[[str, Sequence[Sequence[int]]], list[str]]:
    """Return what names the task of each prompt; `kept` are prompts of each task."""
    names = [*kept]
    centroids = torch.stack([_unit(features(kept[name])).mean(0) for name in names])

    def route(task: str, prompts: Sequence[Sequence[int]]) -> list[str]:
        if not prompts:
            return []
        closest = (_unit(features(prompts)) @ _unit(centroids).T).argmax(1)
        return [names[place] for place in closest.tolist()]

    return route


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x.float(), dim=-1)
