"""A chain in transformers' Trainer: in one process, or in several that share each batch.

    python examples/trainer.py [MODEL_FOLDER_OR_HUB_ID [OUTPUT]]
    torchrun --nproc-per-node 2 examples/trainer.py …
    accelerate launch --multi_gpu --num_processes 2 examples/trainer.py …

Run it from the root of the repository.
"""

import sys

import peft
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from chainlora import ChainCallback

spec = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
output = sys.argv[2] if len(sys.argv) > 2 else "trainer-run"
tokenizer = AutoTokenizer.from_pretrained(spec)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

rows = load_dataset("json", data_files="examples/dates/train.jsonl", split="train")
rows = rows.map(
    lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=rows.column_names
)
trainer = Trainer(
    model=peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(spec),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    args=TrainingArguments(
        output,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=3,
        save_steps=6,
        report_to=[],
        ddp_find_unused_parameters=False,  # every link trains all it has: saves DDP a search
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[ChainCallback(ranks=[8, 8, 8])],
)
trainer.train()
trainer.save_model(f"{output}/final")  # an ordinary adapter, and the chain beside it
