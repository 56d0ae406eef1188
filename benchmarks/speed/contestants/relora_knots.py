"""Knots as ReLoRA's code makes them (arXiv 2307.05695): B·A is added to the weight in place, A
drawn anew, B zeroed, the optimizer's moments zeroed. It keeps no pristine weight and no link; in
bfloat16 the update is lost bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .ours_knots import measured
from .trainer_peft import load


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Merge and start again, several times."""
    model, _ = load(spec)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    return measured(optimizer, partial(merge_and_restart, model))


@torch.no_grad()
def merge_and_restart(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """ReLoRA's merge_and_reinit over all layers, and its optimizer reset."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            module.get_base_layer().weight.add_(
                (b @ a).to(module.get_base_layer().weight.dtype), alpha=module.scaling["default"]
            )
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    return optimizer
