"""The harness the paper used (MeZO's, arXiv 2305.17333): each candidate is a sequence of its own.

Full logits for every position of every candidate, padded on the left; a candidate's score is the
mean log-probability of its tokens, and the loss the cross-entropy over a row's candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from .trainer_peft import arguments, load, ordered_rows, trained


class CandidateTrainer(Trainer):
    """Trainer with MeZO's classification loss."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        counts, labels = inputs.pop("candidate_tokens"), inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[..., :-1, :].contiguous()
        targets = inputs["input_ids"][..., 1:].contiguous()
        places = torch.arange(targets.shape[1], device=targets.device)
        mask = places >= targets.shape[1] - counts[:, None]
        chosen = F.log_softmax(logits, dim=-1).gather(-1, targets[..., None]).squeeze(-1)
        scores = (chosen * mask).sum(-1) / mask.sum(-1)
        loss = F.cross_entropy(scores.view(len(labels), -1).float(), labels)
        return (loss, outputs) if return_outputs else loss


def collate(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return all candidates of all rows as one batch, padded on the left."""
    sequences = [ids for row in rows for ids in row["sequences"]]
    batch = tokenizer.pad({"input_ids": sequences}, padding=True, return_tensors="pt")
    counts = torch.tensor([count for row in rows for count in row["candidate_tokens"]])
    return {
        **batch,
        "candidate_tokens": counts,
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train on candidates."""
    model, tokenizer = load(spec)
    tokenizer.padding_side = "left"
    rows = []
    for row in ordered_rows(spec):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sequences = [
            tokenizer(row["prompt"] + candidate)["input_ids"] for candidate in row["candidates"]
        ]
        rows.append(
            {
                "sequences": sequences,
                "label": row["label"],
                "candidate_tokens": [len(ids) - len(prompt) for ids in sequences],
            }
        )
    trainer = CandidateTrainer(
        model=model,
        args=TrainingArguments(**arguments(spec, remove_unused_columns=False)),
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, tokenizer),
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean over rows already
    return trained(trainer, len(rows) * spec["epochs"])
