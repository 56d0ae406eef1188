"""A chain in a training loop of your own: extend, tune, tie, undo, and a soft knot.

    python examples/own_loop.py [MODEL_FOLDER_OR_HUB_ID]

chainlora brings the chain. Rows, loss, optimizer and steps are yours. Run it from the root of the
repository.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import Chain, LinkConfig, carry_moments

BATCH_SIZE, NUM_STEPS = 8, 6
Batch = dict[str, torch.Tensor]

spec = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(spec)
tokenizer = AutoTokenizer.from_pretrained(spec)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def read_batches(file: str) -> list[Batch]:
    """Return padded batches with labels; the loss is on every token but the padding."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    return [encode(texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)]


def encode(texts: list[str]) -> Batch:
    """Return texts as one padded batch."""
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        return_token_type_ids=False,
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return dict(batch)


def make_update(optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """Return one training step as a function of a batch."""

    def update(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


@torch.no_grad()
def held_out_loss() -> float:
    """Return the mean loss of the validation batches."""
    model.eval()
    loss = sum(model(**batch).loss.item() for batch in validation) / len(validation)
    model.train()
    return loss


training = read_batches("examples/dates/train.jsonl")[:NUM_STEPS]
validation = read_batches("examples/dates/validation.jsonl")
chain = Chain(model, seed=0)
losses = [held_out_loss()]
print(f"before training   loss {losses[0]:.4f}")

for rank in (8, 8, 4):  # length of the chain and rank of each link
    chain.extend(LinkConfig(rank=rank, alpha=2 * rank))
    optimizer = torch.optim.AdamW(chain.parameters(), lr=2e-3, weight_decay=0.0)
    update = make_update(optimizer)
    chain.tune(training, update)
    scales = chain.tie_share(0.5)  # a soft knot: half of the link moves into the weights …
    carry_moments(optimizer, chain.live, scales)  # … and the optimizer continues exactly
    chain.tune(training, update)
    link = chain.tie()
    losses.append(held_out_loss())
    print(f"after link {link.index}      loss {losses[-1]:.4f}   {link.num_steps} steps")

chain.drop(1)  # the links are kept, so undo is exact
assert held_out_loss() == losses[-2]
print(f"last link dropped loss {losses[-2]:.4f}")
plain = chain.detach()  # a plain transformers model: plain.save_pretrained("folder")
