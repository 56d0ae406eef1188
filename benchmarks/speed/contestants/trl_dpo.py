"""TRL's DPOTrainer on pairs of texts.

Its reference is the base with the adapter off, asked again in every step (its default), or before
the first one. Gradient checkpointing, on by default there, is off, as in `trl_sft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from .trainer_peft import arguments, load, ordered_rows, trained


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train on pairs."""
    model, tokenizer = load(spec)
    config = DPOConfig(
        **arguments(spec),
        beta=0.1,
        max_length=None,
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=spec.get("reference_before", False),
    )
    rows = Dataset.from_list(ordered_rows(spec))
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    return trained(trainer, len(rows) * spec["epochs"])
