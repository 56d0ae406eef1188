"""A chain in a training loop of your own: extend, tune, tie, and undo.

    python examples/own_loop.py [MODEL_FOLDER_OR_HUB_ID]

chainlora brings the verbs; rows, loss, optimizer and steps are yours. Run it from the root of the
repository.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import Chain, LinkConfig, drop_links, extend_chain, tie_knot, tune_link

BATCH, STEPS = 8, 6
spec = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(spec)
tokenizer = AutoTokenizer.from_pretrained(spec)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def read_batches(file: str) -> list[dict[str, torch.Tensor]]:
    """Padded batches with labels; the loss is on every token, padding excepted."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    batches = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[start : start + BATCH],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            return_token_type_ids=False,
        )
        encoded["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        batches.append(dict(encoded))
    return batches


def make_update(chain: Chain) -> Callable[[dict[str, torch.Tensor]], None]:
    """One step of training. The optimizer is new, so it knows nothing of earlier links."""
    optimizer = torch.optim.AdamW(chain.parameters(), lr=2e-3, weight_decay=0.0)

    def update(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


@torch.no_grad()
def held_out_loss() -> float:
    model.eval()
    return sum(model(**batch).loss.item() for batch in validation) / len(validation)


training, validation = (
    read_batches("examples/dates/train.jsonl"),
    read_batches("examples/dates/validation.jsonl"),
)
chain = Chain(model, seed=0)
losses = [held_out_loss()]
print(f"before training   loss {losses[0]:.4f}")
for rank in (8, 8, 4):  # chain length and rank step-down in one
    extend_chain(chain, LinkConfig(rank=rank, alpha=2 * rank, target_modules="all-linear"))
    model.train()
    tune_link(chain, training[:STEPS], make_update(chain))
    link = tie_knot(chain)
    losses.append(held_out_loss())
    print(
        f"after link {link.index}      loss {losses[-1]:.4f}   rank {link.rank}, "
        f"{link.num_steps} steps"
    )

drop_links(chain, 1)  # the links are kept, so undo is exact
assert held_out_loss() == losses[-2]
print(f"last link dropped loss {losses[-2]:.4f}")
plain = chain.detach()  # a plain transformers model: plain.save_pretrained("folder")
