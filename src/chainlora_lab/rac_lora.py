"""RAC-LoRA's optimizer (arXiv 2410.08305, Algorithm 1), a plug-in: name it by `plugins`."""

from __future__ import annotations

import torch

from chainlora.config.schema import TrainConfig
from chainlora.training.optimizers import OPTIMIZERS, Groups, from_groups


def rac_lora(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW for B, the last group. A stays as it was drawn."""
    return from_groups(groups[-1:], config.model_copy(update={"optimizer": "adamw"}))


OPTIMIZERS["rac_lora"] = rac_lora
