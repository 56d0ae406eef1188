"""Several processes that train one chain: each computes a share of every batch.

`torchrun` or `accelerate launch` start them. Every process holds the whole model and draws the same
links (`chain.initialization` depends on the seed alone). Of each micro-batch it takes every n-th
row; the gradients of the links are summed over all processes before each update, so that a step is
what one process would have made of the whole batch, to rounding. The first process alone writes.

Or they share the model (`models.shards`): each holds some rows of every weight, and a forward is an
exchange between all of them. Then all must make equally many forwards, so a process without rows of
its own computes a row of others (`idle`) and drops the result.

For one process, each method here is the plain thing. What processes tell each other are numbers and
JSON, never pickles.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn

from chainlora.chain.holding import holding_named
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError, ConfigError, ToldError, TrainingError
from chainlora.training.interrupts import SIGNALS, stop_requested

Item = TypeVar("Item")
Found = TypeVar("Found")

# The first process may encode a large data set, or score all stages, while the others wait.
PATIENCE = timedelta(hours=6)


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: which of them this is; 0 is the first, which writes.
        count: how many there are.
        device: where this process computes, and its numbers are summed.
        shares_model: whether each holds a share of the model, and not all of it.
    """

    def __init__(
        self, rank: int, count: int, device: torch.device, *, shares_model: bool = False
    ) -> None:
        self.rank, self.count, self.device = rank, count, device
        self.shares_model = shares_model
        self._asked_to_stop: int | None = None  # by a signal that all processes know of
        self._is_over = False  # a problem is known to all

    @property
    def is_first(self) -> bool:
        """Say whether this process writes and prints for all."""
        return self.rank == 0

    # --- sharing work ---

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of a batch that this process computes."""
        return items[self.rank :: self.count] if self.count > 1 else items

    def idle(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return what this process computes for nothing: an item, where it has none of its own.

        Processes that share a model make equally many forwards.
        """
        return items[:1] if self.shares_model and not self.share(items) else items[:0]

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Found]]
    ) -> list[Found]:
        """Return what `compute` returns for all items, each computed by one process.

        The results must be what JSON can hold.
        """
        if self.count == 1:
            return compute(items)
        mine, idle = self.share(items), self.idle(items)
        if idle:
            compute(idle)
        parts = self._gather(compute(mine) if mine else [])
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            found[rank :: self.count] = part
        return found

    def seed(self, seed: int, step: int) -> None:
        """Seed the generator of a step: dropout depends on seed, step and process alone."""
        torch.manual_seed((seed << 32) + step)
        if self.rank > 0:  # other rows must not get the same mask
            torch.manual_seed(int(torch.randint(2**62, (self.count,))[self.rank]))

    def most(self, number: int) -> int:
        """Return the largest of the numbers that all processes have here."""
        return number if self.count == 1 else max(self._gather(number))

    # --- one result ---

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over all processes, and agree on whether a signal asked to stop."""
        if self.count == 1:
            return list(numbers)
        asked = stop_requested()
        flags = [float(asked == number) for number in SIGNALS]
        tensor = torch.tensor([*numbers, *flags], dtype=torch.float64, device=self.device)
        self._all_reduce(tensor)
        *sums, _, _ = found = tensor.tolist()
        said = [number for number, flag in zip(SIGNALS, found[-2:], strict=True) if flag]
        self._asked_to_stop = said[0] if said else None
        return sums

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: float = 0.0) -> float:
        """Sum ``parameter.grad`` over all processes, None where no process has one, and `loss`."""
        if self.count == 1:
            return loss
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told = [loss, *(float(p.grad is not None) for p in parameters)]
        ends = torch.tensor(told, dtype=torch.float32, device=self.device)
        flat = torch.cat([*(part.float().flatten() for part in parts), ends])
        self._all_reduce(flat)
        *sums, ends = flat.split([*(part.numel() for part in parts), len(told)])
        total, *is_there = ends.tolist()
        for parameter, value, any_has in zip(parameters, sums, is_there, strict=True):
            if any_has:
                parameter.grad = value.view_as(parameter).to(parameter.dtype)
        return float(total)

    def stop_requested(self) -> int | None:
        """Return the signal that asked the run to stop, once all processes know of it."""
        return stop_requested() if self.count == 1 else self._asked_to_stop

    def check_same(self, parameters: Iterable[Tensor]) -> None:
        """Raise TrainingError unless all processes hold the same link, to the same bits."""
        if self.count == 1:
            return
        sums = [p.detach().double().sum() for p in parameters]
        digest = [math.fsum(map(float, sums)), float(torch.stack(sums).norm()) if sums else 0.0]
        found = self._gather(digest)
        if any(each != found[0] for each in found):
            raise TrainingError(
                "all processes must hold the same link (got sums "
                f"{', '.join(str(each[0]) for each in found)}); use like machines and versions for "
                "all of them"
            )

    # --- before training ---

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what may be refused: what one process refuses ends all, and the first one says it.

        Inside, processes must meet in `in_turn` only.
        """
        try:
            yield
        except ChainLoRAError as error:
            if not self._is_over:
                self._meet(str(error))
            raise
        self._meet()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process do something before the others: claim, download, encode."""
        if not self.is_first:
            self._meet()
        yield
        if self.is_first:
            self._meet()

    def _meet(self, problem: str | None = None) -> None:
        """Wait for all processes; raise where one of them has a problem that is not said here."""
        if self.count == 1:
            return
        try:
            problems = self._gather(problem)
        except TrainingError:
            if problem is None:
                raise
            return  # what is wrong here comes first
        told = [f"{text} (process {rank})" for rank, text in enumerate(problems) if text]
        self._is_over = bool(told)
        if told and not self.is_first:
            raise ToldError(told[0])
        if told and problem is None:
            raise TrainingError(told[0])

    # --- how they talk ---

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of each process, in their order."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(data)
        self._all_reduce(sizes)
        lengths = [int(size) for size in sizes]
        rows = torch.zeros(self.count, max(lengths), dtype=torch.uint8, device=self.device)
        rows[self.rank, : len(data)] = data.to(self.device)
        self._all_reduce(rows)
        parts = [row[:length] for row, length in zip(rows.cpu(), lengths, strict=True)]
        return [json.loads(bytes(part.tolist())) for part in parts]

    def _all_reduce(self, tensor: Tensor) -> None:
        try:
            distributed.all_reduce(tensor)
        except RuntimeError as error:
            raise self._lost(error) from None

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Say it where a forward of a shared model finds that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            is_lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
            if self.shares_model and is_lost:
                raise self._lost(error) from None
            raise

    def _lost(self, error: RuntimeError) -> TrainingError:
        reason = " ".join(str(error).split())
        return TrainingError(
            f"the {self.count} processes of a run must go on together (process {self.rank} lost "
            f"another one: {reason[:120]}); see what the other one says, then resume"
        )


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Leave Accelerate as it was, which one process can set up once: a script may want another."""
    is_new = not AcceleratorState._shared_state
    try:
        yield
    finally:
        if is_new and not distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)


def find_processes(
    accelerator: Accelerator | AcceleratorState, *, share_model: bool = False
) -> Processes:
    """Return the processes that Accelerate has found; several can share the model."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", *(["FSDP"] if share_model else [])):
        raise ConfigError(
            "processes must hold the whole model each, or share it by FSDP2 (got an Accelerate "
            f"config for {kind}); launch with torchrun, or `accelerate launch` without DeepSpeed, "
            "Megatron or TPU"
        )
    if accelerator.num_processes != num_launched():
        raise ConfigError(
            f"all processes must find each other (got {num_launched()} by WORLD_SIZE and "
            f"{accelerator.num_processes} by Accelerate); unset WORLD_SIZE, or launch with "
            "torchrun; a trainer on CPUs needs use_cpu=True"
        )
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        shares_model=share_model and accelerator.num_processes > 1,
    )


def leave_processes(status: int = 0) -> None:
    """End this process with `status` if it is one of several; do nothing if it is the only one.

    Threads of Gloo may still let go of what they exchanged, and while the interpreter is torn down
    that aborts the process, after all its work. `destroy_process_group` does
    not end them, since meshes keep the group. So there is no teardown.
    """
    if not distributed.is_initialized():
        return
    if status == 0:  # else others may be gone, and it would wait for them
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def num_launched() -> int:
    """Return how many processes a launcher says it has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def wait_for_all() -> None:
    """Let all processes come here: the first one writes what the others read next."""
    if num_launched() > 1:
        cpu = not torch.accelerator.is_available()
        with finding_each_other():
            state = PartialState(cpu=cpu, timeout=PATIENCE)
        state.wait_for_everyone()


@contextmanager
def finding_each_other() -> Iterator[None]:
    """Say what is missing where Accelerate has some of a launcher's variables without the others.

    Nothing of the attempt is left: another one says the same.
    """
    try:
        yield
    except ValueError as error:
        AcceleratorState._reset_state(reset_partial_state=True)
        raise ConfigError(
            "Accelerate must find the processes that the environment names",
            error,
            "launch with torchrun, or unset LOCAL_RANK and WORLD_SIZE",
        ) from error


def is_first_launched() -> bool:
    """Say whether this is the process that shows things, of those that a launcher has started."""
    return num_launched() < 2 or os.environ.get("RANK", "0") == "0"


# --- a model that they share ---


def wants_shards(config: RunConfig) -> bool:
    """Say whether processes are to share the model, by `train.shard` or by `accelerate launch`.

    Raises ConfigError where Accelerate is set to FSDP1 or DeepSpeed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "processes share a model by `train.shard` (got an Accelerate config with DeepSpeed); "
            "launch with torchrun, and set train.shard: fsdp2"
        )
    by_accelerate = _is_set("ACCELERATE_USE_FSDP")
    version = os.environ.get("FSDP_VERSION", "1")
    if by_accelerate and version != "2":
        raise ConfigError(
            f"FSDP must be FSDP2 (got an Accelerate config with fsdp_version: {version}); set "
            "fsdp_version: 2, or launch with torchrun and set train.shard: fsdp2"
        )
    return by_accelerate or config.train.shard is not None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def refuse_one_process(config: RunConfig) -> None:
    """Raise ConfigError where one process alone is to share the model."""
    if config.train.shard is not None:
        raise ConfigError(
            f"`train.shard: {config.train.shard}` shares the model between several processes",
            "one process",
            "launch with torchrun --nproc-per-node 2 -m chainlora train CONFIG, or set "
            "train.shard: null",
        )


def check_shards(config: RunConfig) -> None:
    """Raise ConfigError for what a shared model cannot do."""
    chain = config.chain
    refused = {
        "quantize": config.quantize is not None,
        "chain.init: pissa": chain.init == "pissa",
    }
    if found := [key for key, is_set in refused.items() if is_set]:
        raise ConfigError(
            f"processes that share a model train plain LoRA on it (got {found[0]}, which needs "
            "whole weights); leave it out, or train.shard: each process then holds the whole model"
        )
    if chain.knots is not None and holding_named(chain.hold).writes_base:
        raise ConfigError(
            "soft knots on a shared model need hold: carried (got hold: tied, whose exact weights "
            "no single process can save); set chain.hold: carried"
        )
