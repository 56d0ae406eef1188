"""TRL's SFTTrainer on a prompt-completion dataset (its loss is then the completion's), without or
with its packing.

Gradient checkpointing, on by default there, is off: it costs a forward pass and ours runs without
it. With packing a batch is one pack long enough for a batch of rows, so that updates stay as many
as the model's context allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from .trainer_peft import arguments, load, ordered_rows, trained


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train on completions."""
    model, tokenizer = load(spec)
    pairs = [
        {"prompt": row["prompt"], "completion": row["completion"]} for row in ordered_rows(spec)
    ]
    more: dict[str, Any] = {"max_length": None}
    if spec.get("packing"):
        # the tokens of a batch of rows, and a twentieth, since packs are never quite full
        total = sum(len(_ids(pair, tokenizer)) + 1 for pair in pairs)
        length = math.ceil(1.05 * total / math.ceil(len(pairs) / spec["batch_size"]))
        length = min(model.config.max_position_embeddings, length)
        more = {"packing": True, "per_device_train_batch_size": 1, "max_length": length}
    config = SFTConfig(
        **arguments(spec, **more), bf16=spec["dtype"] == "bfloat16", gradient_checkpointing=False
    )
    rows = Dataset.from_list(pairs)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    return trained(trainer, len(rows) * spec["epochs"]) | {"packs": len(trainer.train_dataset)}


def _ids(pair: Mapping[str, Any], tokenizer: Any) -> list[int]:
    whole = pair["prompt"] + pair["completion"]
    if isinstance(whole, str):
        return tokenizer(whole)["input_ids"]
    return tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
