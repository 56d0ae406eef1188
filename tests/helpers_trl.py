"""TRL's trainers on tiny models and a few rows. Needs TRL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers_integrations import arguments, lora, plain_model

if TYPE_CHECKING:  # these imports take seconds
    from datasets import Dataset
    from trl import DPOTrainer, SFTTrainer


WORDS = ["cat", "mat", "hill", "birds"]
PAIRS = [(first, second) for second in WORDS for first in WORDS] * 3


def conversations() -> Dataset:
    from datasets import Dataset

    rows = [
        [
            {"role": "user", "content": f"the {first} sat"},
            {"role": "assistant", "content": f"on a {second}"},
        ]
        for first, second in PAIRS
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


def preferences() -> Dataset:
    from datasets import Dataset

    rows = [
        {"prompt": f"the {first} was", "chosen": f" good {second}", "rejected": f" bad {second}"}
        for first, second in PAIRS
    ]
    return Dataset.from_list(rows)


def sft(folder, tokenizer, output: Path, callback, **keys) -> SFTTrainer:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=plain_model(folder),
        args=SFTConfig(**arguments(output, max_length=64, bf16=False) | keys),
        train_dataset=conversations(),
        eval_dataset=conversations().select(range(8)),
        processing_class=tokenizer,
        peft_config=lora(task_type=None),
        callbacks=[callback],
    )


def dpo(
    folder, tokenizer, output: Path, callback, model=None, ref_model=None, **keys
) -> DPOTrainer:
    """The reference is computed before, unless `keys` say otherwise: knots would move it."""
    from trl import DPOConfig, DPOTrainer

    keys = {"precompute_ref_log_probs": True} | keys
    wrap = {} if model is not None else {"peft_config": lora(task_type=None)}
    return DPOTrainer(
        model=model or plain_model(folder),
        ref_model=ref_model,
        args=DPOConfig(**arguments(output, max_length=64, bf16=False) | keys),
        train_dataset=preferences(),
        eval_dataset=preferences().select(range(8)),
        processing_class=tokenizer,
        callbacks=[callback],
        **wrap,
    )


MAKERS = {"SFTTrainer": sft, "DPOTrainer": dpo}
