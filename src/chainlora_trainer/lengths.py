"""Facts about a trainer's run before its first step: knots, tokens of rows, processes.

Each process of a trainer has the whole model, and DDP sums the gradients. DDP registers parameters
when it wraps the model, so all links of such a run must have the parameters of the first link.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from chainlora.errors import ConfigError
from chainlora.knots.numbers import between, some_of
from chainlora.training.processes import Processes, find_processes

Lengths = int | Sequence[int] | None
Epochs = float | Sequence[float] | None


def check_knots(ranks: Sequence[int] | None, steps: Lengths, epochs: Epochs) -> None:
    """Raise ConfigError for arguments that contradict each other."""
    if ranks is not None and (not isinstance(ranks, list | tuple) or not ranks):
        raise ConfigError(f"`ranks` must list a rank for each link (got {ranks!r}); e.g. [8, 8]")
    if steps is not None and epochs is not None:
        raise ConfigError("give `steps` or `epochs`, not both (got both); leave one out")
    given: dict[str, Any] = {"steps": steps, "epochs": epochs}
    for key, value in given.items():
        if value is None:
            continue
        is_list = isinstance(value, Collection) and not isinstance(value, str)
        listed = list(value) if is_list else [value]
        is_wrong = not all(isinstance(v, Real) and v is not True and float(v) > 0 for v in listed)
        if not listed or is_wrong or (key == "steps" and any(v % 1 for v in listed)):
            rule = "positive whole numbers" if key == "steps" else "positive"
            raise ConfigError(f"`{key}` must be {rule} (got {value!r})")
        if is_list and ranks is not None and len(ranks) != len(listed):
            raise ConfigError(
                f"`ranks` and `{key}` must have one length (got {len(ranks)} and {len(listed)}); "
                "give one entry per link"
            )


def link_lengths(
    num_links: int | None,
    steps: Lengths,
    epochs: Epochs,
    num_steps: int,
    steps_per_epoch: int | None,
) -> list[int]:
    """Return the steps of each link.

    A number of steps or epochs is the distance between knots, and the last link gets the rest; a
    list has an entry per link. Without both, the links share the run evenly.

    Args:
        num_links: the number of ranks; None allows any number of links.
        num_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch; None if the data set has no length.

    Raises ConfigError if the lengths do not fit the run.
    """
    if epochs is not None and steps_per_epoch is None:
        raise ConfigError(
            "knots by epochs need a data set with a length (got one without); give `steps`"
        )
    given: Any = epochs if steps is None else steps
    unit = 1 if steps is not None else steps_per_epoch or 0
    if given is None:
        count = num_links or 1
        ends = [round(num_steps * (k + 1) / count) for k in range(count)]
    elif isinstance(given, Collection):
        parts = list(given)
        ends = [round(sum(parts[: k + 1]) * unit) for k in range(len(parts))]
        if abs(sum(parts) * unit - num_steps) < 1:
            ends[-1] = num_steps  # trainers round the last epoch up
    else:
        distance = float(given * unit)
        if distance >= num_steps:
            argument = f"epochs={epochs:g}" if steps is None else f"steps={steps}"
            raise ConfigError(
                f"the first knot must come before the end of the run (got {argument} for "
                f"{num_steps} steps); tie more often, or train longer"
            )
        ends = [round(distance * (k + 1)) for k in range(math.ceil(num_steps / distance) - 1)]
        ends = [*(end for end in ends if end < num_steps), num_steps]
    lengths = list(between(ends))
    _check_lengths(lengths, num_links, num_steps)
    return lengths


def _check_lengths(lengths: Sequence[int], num_links: int | None, num_steps: int) -> None:
    """Raise ConfigError unless the lengths fit the ranks and the run."""
    if num_links is not None and len(lengths) != num_links:
        raise ConfigError(
            f"`ranks` must have one entry per link (got {num_links} for {len(lengths)} links of "
            f"{lengths} steps); change one of them"
        )
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"every link must have at least one step (got {lengths!r:.60}); tie less often"
        )
    if sum(lengths) != num_steps:
        raise ConfigError(
            f"the links must add up to the run (got {lengths}, together {sum(lengths)}, for "
            f"{num_steps} steps); change them, or the trainer's max_steps or num_train_epochs"
        )


def steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    """Return the optimizer steps of an epoch as the trainer counts them; None if unknown."""
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        return None
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def learned_a_step(loader: Any, args: TrainingArguments, num_processes: int) -> float:
    """Return the mean number of learned tokens per optimizer step."""
    rows: float = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    if per_epoch := steps_per_epoch(loader, args):
        rows = min(rows, len(loader.dataset) / per_epoch)  # the last step can have fewer rows
    return rows * learned_a_row(loader)


def learned_a_row(loader: Any) -> float:
    """Return the mean number of learned tokens per row, from the collator's labels of some rows.

    Raises ConfigError if rows cannot be read, or if the batches have no labels.
    """
    remedy = "give `knots` a time_constant, in steps"
    rows: Any = getattr(loader, "dataset", None)
    try:
        sample = some_of(rows)
    except (TypeError, NotImplementedError, KeyError):
        rule = "soft knots count the tokens of some rows, so the data set must have a length"
        raise ConfigError(rule, type(rows).__name__, remedy) from None
    batch = loader.collate_fn(sample)
    if "labels" in batch:  # per token, or one per row
        learned = (batch["labels"] != -100).sum()
    elif "completion_mask" in batch:  # TRL's pairs of preferences; chosen answers come first
        learned = batch["completion_mask"][: len(sample)].sum()
    else:
        rule = "soft knots count learned tokens, so batches must have `labels`"
        got = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigError(rule, got, remedy)
    return max(int(learned), 1) / len(sample)


def find_trainer_processes(args: TrainingArguments, model: nn.Module) -> Processes:
    """Return the processes of a trainer.

    Raises ConfigError if the model is sharded or copied within a process: a knot would have to
    change every part.
    """
    sharded = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        sharded.append("tensor parallel")
    state = AcceleratorState()
    if not sharded and state.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        sharded.append(f"an Accelerate config for {state.distributed_type.value}")
    if sharded:
        raise ConfigError(
            f"with ChainCallback each process needs the whole model (got {sharded[0]}); launch "
            "with torchrun without sharding, or use `chainlora train` with train.shard: fsdp2"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"with ChainCallback each process uses one GPU (got {args.n_gpu}); launch a process "
            f"per GPU by torchrun --nproc-per-node {args.n_gpu}, or select a GPU by "
            "CUDA_VISIBLE_DEVICES"
        )
    return find_processes(state)
