"""transformers.Trainer + PEFT, as their documentation has it.

The prompt's labels are -100, the collator pads to the longest row of a batch on the right, the
model computes full logits and its own loss. In bfloat16 the model is loaded in bfloat16 (PEFT keeps
the adapter in float32), which is faster here than autocast over float32 weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from measuring import Steps
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class StepCallback(TrainerCallback):
    """Mark the end of every step, and keep the losses Trainer logs."""

    def __init__(self) -> None:
        self.steps = Steps()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.mark()

    def on_log(self, *args: Any, logs: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.steps.losses.append(float(logs["loss"]))


def load(spec: Mapping[str, Any]) -> tuple[PeftModel, Any]:
    """Return the PEFT model, with the A that ours draws (so that losses can be compared), and the
    tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    model.config.use_cache = False
    targets = spec["targets"] if isinstance(spec["targets"], str) else list(spec["targets"])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules=targets,
    )
    model = get_peft_model(model, lora)
    same_start(model, spec)
    return model, tokenizer


@torch.no_grad()
def same_start(model: PeftModel, spec: Mapping[str, Any]) -> None:
    """Copy the random A of our first link into the adapter."""
    from chainlora.chain.initialization import generator_for, random_factors
    from chainlora.config.schema import LinkConfig

    config = LinkConfig(rank=spec["rank"], alpha=spec["alpha"])
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            factors = random_factors(
                config,
                module.in_features,
                module.out_features,
                generator_for(spec["seed"], 0, name),
            )
            module.lora_A["default"].weight.copy_(factors.a)


def ordered_rows(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the workload's rows in the order of training."""
    with open(spec["files"]["ordered"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def arguments(spec: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the arguments that all Trainer contestants share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": spec["batch_size"],
        "num_train_epochs": spec["epochs"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": spec["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        **more,
    }


def tokenize(row: Mapping[str, Any], tokenizer: Any, *, eos: bool) -> dict[str, list[int]]:
    """Return input ids and labels, -100 on the prompt."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] * eos
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * len(prompt) + ids[len(prompt) :],
    }


def trained(trainer: Trainer, num_rows: int) -> dict[str, Any]:
    """Train; return the measures of so many rows, those of all epochs."""
    callback = StepCallback()
    trainer.add_callback(callback)
    trainer.train()
    return callback.steps.result(num_rows)


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train on completions."""
    model, tokenizer = load(spec)
    tokenizer.padding_side = "right"
    rows = [tokenize(row, tokenizer, eos=not row["candidates"]) for row in ordered_rows(spec)]
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    args = TrainingArguments(**arguments(spec))
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
    return trained(trainer, len(rows) * spec["epochs"])
