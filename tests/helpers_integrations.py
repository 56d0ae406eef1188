"""Trainers of others on tiny models, and the loop of our own that they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from helpers import as_row, start_as_ours, training_examples
from helpers_export import logits
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from chainlora import Chain, ChainCallback, Link, LinkConfig, carry_moments

TARGETS = ["q_proj", "v_proj"]
LR, ALPHA = 1e-2, 8
Batch = dict[str, torch.Tensor]


def token_rows(count: int = 48, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 5 to 12 tokens that repeat a pair: learnable in a few steps."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 13, (1,), generator=draw))
        pair = torch.randint(3, 40, (2,), generator=draw).tolist()
        ids = [1, *(pair * 6)[:length]]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    return rows


class Recorder:
    """A collator that keeps what it returned, for a loop of our own."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate, self.batches = collate, []

    def __call__(self, rows: Any) -> Any:
        batch = self.collate(rows)
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def lora(rank: int = 4, **keys: Any) -> peft.LoraConfig:
    settings = {"lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=rank, **settings | keys)


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def peft_model(folder: Path, rank: int = 4, **keys: Any) -> peft.PeftModel:
    return peft.get_peft_model(plain_model(folder), lora(rank, **keys))


def arguments(output: Path, **keys: Any) -> dict[str, Any]:
    """What every trainer here is given; the rate falls linearly over the run."""
    return {
        "output_dir": str(output),
        "max_steps": 11,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "optim": "adamw_torch_fused",  # the default, with PyTorch 2.8 or later
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | keys


def make_trainer(
    model: Any,
    tokenizer: Any,
    output: Path,
    callback: TrainerCallback | None,
    optimizers: Any = (None, None),
    **keys: Any,
) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(output, **keys)),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8, seed=1),
        data_collator=Recorder(collator(tokenizer)),
        processing_class=tokenizer,
        optimizers=optimizers,
        callbacks=[callback] if callback is not None else None,
    )


def trained_by_peft(
    config: Any, model: Any, output: Path, **keys: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train PEFT's LoRA by transformers' Trainer, all rows a step, as a config of one link says;
    return losses and factors."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = [as_row(example) for example in training_examples(config, tokenizer)]
    start_as_ours(model, config.chain.links()[0], config.train.seed)
    own = {"max_steps": config.chain.steps[0], "per_device_train_batch_size": len(rows)}
    args = TrainingArguments(**arguments(output, learning_rate=config.train.lr, **own | keys))
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator(tokenizer))
    trainer.train()
    losses = [float(each["loss"]) for each in trainer.state.log_history if "loss" in each]
    return losses, peft.get_peft_model_state_dict(model)


def trainer_loss(trainer: Trainer) -> Callable[[Any, Batch], torch.Tensor]:
    """The loss of a batch as this Trainer takes it: the sum by the number of labels it counts.

    Before transformers 5.10.1 its count has the first label of each row too, which the shift of a
    causal language model leaves out of the sum (huggingface/transformers#46204).
    """
    first = 1 if getattr(trainer, "_loss_shifts_labels", False) else 0

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        count = batch["labels"][:, first:].ne(-100).sum()
        return model(**batch, num_items_in_batch=count).loss

    return loss


def own_loop(
    folder: Path,
    batches: list[Batch],
    ranks: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    loss: Callable[[Any, Batch], torch.Tensor] | None = None,
    seed: int = 3,
    restart: bool = False,
    soft: tuple[int, float] | None = None,
) -> Chain:
    """Algorithm 1 with plain PyTorch around it: AdamW, a rate that falls linearly, clipped
    gradients; `soft` is the distance of soft knots and their share, which follows the rate."""
    model = plain_model(folder)
    loss = loss or (lambda model, batch: model(**batch).loss)
    chain, total, rest = Chain(model, seed=seed), sum(lengths), iter(batches)
    scaling = ALPHA / ranks[0]
    configs = [LinkConfig(rank=r, alpha=scaling * r, target_modules=tuple(TARGETS)) for r in ranks]

    def steps(link: int) -> Iterator[Batch]:
        return (next(rest) for _ in range(lengths[link]))

    def update(link: int) -> Callable[[Batch], None]:
        optimizer = torch.optim.AdamW(chain.parameters(), lr=LR, weight_decay=0.0, fused=True)
        length = lengths[link] if restart else total
        schedule = get_scheduler("linear", optimizer, 0, length)
        for _ in range(0 if restart else sum(lengths[:link])):
            schedule.step()

        def step(batch: Batch) -> None:
            model.train()
            loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(list(chain.parameters()), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done = chain.live_steps + 1
            if soft and done < length and done % soft[0] == 0:
                share = soft[1] * schedule.get_last_lr()[0] / LR
                carry_moments(optimizer, chain.live, chain.tie_share(share))

        return step

    chain.fit(configs, steps, update)
    return chain


def assert_links_agree(chain: Chain, other: Chain, atol: float = 0.0) -> None:
    """Same links: ranks, steps, modules, and factors to `atol`."""
    assert [link.config.rank for link in chain.links] == [link.config.rank for link in other.links]
    assert [link.num_steps for link in chain.links] == [link.num_steps for link in other.links]
    for mine, theirs in zip(chain.links, other.links, strict=True):
        assert_same_factors(mine, theirs, atol)
        assert all(factors.b.any() for factors in mine.factors.values())


def assert_same_factors(link: Link, other: Link, atol: float = 0.0) -> None:
    assert link.factors.keys() == other.factors.keys()
    for name, factors in link.factors.items():
        torch.testing.assert_close(factors.a, other.factors[name].a, atol=atol, rtol=0)
        torch.testing.assert_close(factors.b, other.factors[name].b, atol=atol, rtol=0)


def assert_adapter_is_the_model(folder: Path, adapter: Path, model: Any, atol: float) -> None:
    """The adapter, loaded by PEFT on the plain base, computes what the trainer's model computes."""
    names = load_file(adapter / "adapter_model.safetensors")
    assert not [name for name in names if "base_layer" in name or "lora_" not in name]
    loaded = peft.PeftModel.from_pretrained(plain_model(folder), adapter)
    torch.testing.assert_close(logits(loaded), logits(model), atol=atol, rtol=0)


def chain_of(trainer: Trainer) -> Chain:
    """The chain of a trainer, its last link tied."""
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ChainCallback)]
    if callback.chain.live is not None:
        callback.chain.tie()
    return callback.chain


class StopAt(TrainerCallback):
    """Ends a run after a step as a kill would: nothing is done on the way out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
