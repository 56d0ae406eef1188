"""Knots as ReLoRA's code makes them (arXiv 2307.05695): B·A is added to the weight in place, A
drawn anew, B zeroed, the optimizer's moments zeroed. It keeps no pristine weight and no link; in
bfloat16 the update is lost bit by bit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from measuring import peak_mb
from torch import nn

from .ours_knots import NUM_KNOTS, _train_a_little
from .trainer_peft import load


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Merge and start again, several times."""
    model, _ = load(spec)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    seconds: list[float] = []
    before = 0.0
    for _ in range(NUM_KNOTS):
        _train_a_little(optimizer)
        before = before or peak_mb()
        began = time.perf_counter()
        merge_and_restart(model, optimizer)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds_per_knot": statistics.median(seconds),
        "knot_seconds": [round(s, 4) for s in seconds],
        "peak_before_first_knot_mb": before,
        "peak_after_knots_mb": peak_mb(),
    }


@torch.no_grad()
def merge_and_restart(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
