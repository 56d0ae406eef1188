"""The processes that a trainer runs in: each holds the whole model, and DDP sums the gradients.

DDP learns which parameters it sums when it wraps the model, before the first step. So the links of
such a run must have the parameters of its first link.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from chainlora.errors import ConfigError
from chainlora.training.processes import Processes, find_processes


def find_trainer_processes(args: TrainingArguments, model: nn.Module) -> Processes:
    """Return the processes of a trainer that has been made.

    Raises ConfigError for what shards or copies the model: a knot would have to be tied on every
    part of it.
    """
    sharded = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        sharded.append("tensor parallel")
    state = AcceleratorState()
    if not sharded and state.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        sharded.append(f"an Accelerate config for {state.distributed_type.value}")
    if sharded:
        raise ConfigError(
            f"with ChainCallback each process holds the whole model (got {sharded[0]}); launch "
            "with torchrun without it, or share the model by `chainlora train` with train.shard: "
            "fsdp2"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"with ChainCallback a process has one GPU (got {args.n_gpu}); launch one for each by "
            f"torchrun --nproc-per-node {args.n_gpu}, or show one by CUDA_VISIBLE_DEVICES"
        )
    return find_processes(state)


def check_ranks(ranks: Sequence[int], processes: Processes) -> None:
    """Raise ConfigError for links whose parameters DDP could not know of from the beginning."""
    if processes.count > 1 and len(set(ranks)) > 1:
        raise ConfigError(
            f"in several processes all ranks must be equal (got {list(ranks)}): the trainer's DDP "
            "knows the first link's parameters alone; change them, or use `chainlora train`"
        )
