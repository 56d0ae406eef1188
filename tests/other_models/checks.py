"""A chain on a class of models: in a loop of one's own, and in transformers' Trainer.

Everything goes through the public interface. Outputs are compared with those of the same class
loaded by transformers, and of PEFT on the plain base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from helpers_integrations import arguments, chain_of
from torch import Tensor
from transformers import Trainer, TrainingArguments

from chainlora import Chain, ChainCallback, LinkConfig, export_adapter, load_chain, save_chain
from other_models.classes import KINDS, ROWS, Batch, load, new_model

# One product W x + s·B A x is summed in another order than (W + s·B A) x: float32 rounding over two
# layers, of outputs below 10.
ROUNDING = 5e-5
STEPS, RATE = 6, 5e-3


@torch.no_grad()
def outputs(model: Any, batch: Batch) -> Tensor:
    """Return what a model says to a batch, as one row."""
    return model.eval()(**batch).logits.flatten()


def save_base(name: str, folder: Path) -> Path:
    """Write the base of a class."""
    new_model(name).save_pretrained(folder)
    return folder


def check_own_loop(name: str, work: Path) -> dict[str, float]:
    """Tune, tie, undo, save, load and export a chain; return differences, each of what it may be.

    Raises whatever chainlora refuses.
    """
    kind = KINDS[name]
    folder, batch, found = save_base(name, work / "base"), kind.batch(), dict[str, float]()
    model = load(name, folder)
    start = outputs(model, batch)
    chain = Chain(model, checkpoint=folder)
    keys = {"target_modules": kind.targets}
    states, losses = [start], []
    for rank in (4, 2):
        chain.extend(LinkConfig(rank=rank, alpha=2 * rank, **keys))
        found[f"extend {rank}"] = _difference(outputs(model, batch), states[-1])
        losses += tune(chain, batch)
        live = outputs(model, batch)
        if rank == 2:
            save_chain(chain, work / "chain")
        chain.tie()
        found[f"knot {rank}"] = _difference(outputs(model, batch), live)
        states.append(outputs(model, batch))
    found["learns"] = 0.0 if losses[-1] < losses[0] else 2.0

    loaded = load_chain(work / "chain", load(name, folder), checkpoint=folder)
    loaded.tie()
    found["load"] = _difference(outputs(loaded.model, batch), states[2], exact=True)
    for each in (chain, loaded):
        (last,) = each.drop(1)
        found["undo"] = _difference(outputs(each.model, batch), states[1], exact=True)
        each.drop(1)
        found["undo all"] = _difference(outputs(each.model, batch), start, exact=True)
    for link in (*load_chain(work / "chain", load(name, folder)).links, last):
        chain.add(link)
    found["again"] = _difference(outputs(model, batch), states[2], exact=True)

    export_adapter(chain, work / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(name, folder), work / "adapter")
    found["adapter"] = _difference(outputs(adapted, batch), states[2])
    chain.detach().save_pretrained(work / "merged")
    found["merged"] = _difference(
        outputs(load(name, work / "merged"), batch), states[2], exact=True
    )
    return found


def check_trainer(name: str, work: Path) -> dict[str, float]:
    """The same chain by a Trainer, resumed across a knot."""
    kind = KINDS[name]
    folder, batch, found = save_base(name, work / "base"), kind.batch(), dict[str, float]()
    whole = _trainer(name, folder, work / "whole")
    whole.train()
    whole.save_model(str(work / "final"))
    told = outputs(whole.model, batch)
    adapted = peft.PeftModel.from_pretrained(load(name, folder), work / "final")
    found["adapter"] = _difference(outputs(adapted, batch), told)

    resumed = _trainer(name, folder, work / "whole")
    resumed.train(resume_from_checkpoint=str(work / f"whole/checkpoint-{STEPS + 2}"))
    found["resume"] = _difference(outputs(resumed.model, batch), told, exact=True)

    chain = chain_of(resumed)
    found["knot"] = _difference(outputs(chain.model, batch), told)
    chain.drop(2)
    start = outputs(load(name, folder), batch)
    found["undo all"] = _difference(outputs(chain.model, batch), start, exact=True)
    history = [record["loss"] for record in whole.state.log_history if "loss" in record]
    found["learns"] = 0.0 if history[-1] < history[0] else 2.0
    return found


def _trainer(name: str, folder: Path, output: Path) -> Trainer:
    kind = KINDS[name]
    batch = kind.batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]
    keys = {"max_steps": 2 * STEPS, "per_device_train_batch_size": ROWS, "learning_rate": RATE}
    keys |= {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": STEPS + 2}
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        task_type=kind.task,
        target_modules=kind.targets if isinstance(kind.targets, str) else list(kind.targets),
    )
    return Trainer(
        model=peft.get_peft_model(load(name, folder), lora),
        args=TrainingArguments(**arguments(output, **keys)),
        train_dataset=rows,
        callbacks=[ChainCallback(ranks=[4, 2], steps=[STEPS, STEPS])],
    )


def tune(chain: Chain, batch: Batch, steps: int = STEPS) -> list[float]:
    """Tune the live link on one batch; return the losses."""
    optimizer, losses = torch.optim.AdamW(chain.parameters(), lr=RATE), []
    for _ in range(steps):
        loss = chain.model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        chain.count_step()
        losses.append(loss.item())
    return losses


def _difference(mine: Tensor, theirs: Tensor, *, exact: bool = False) -> float:
    """Return the largest difference as a share of rounding; of none, where it is to be exact."""
    if exact:
        return 0.0 if torch.equal(mine, theirs) else 2.0
    return (mine - theirs).abs().max().item() / ROUNDING


CHECKS: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "own loop": check_own_loop,
    "Trainer": check_trainer,
}
