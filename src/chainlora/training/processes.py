"""Train one chain in several processes, started by `torchrun` or `accelerate launch`.

Each process holds the whole model and draws the same links (`chain.initialization` depends only on
the seed). It computes every n-th row of a micro-batch. Gradients are summed over all processes
before each update, so a step equals the step of one process with the whole batch, up to rounding.
Only the first process writes files.

Processes can also shard the model (`models.shards`): each holds some rows of every weight, and a
forward pass exchanges them. All processes must then make the same number of forward passes. A
process without rows computes a row of another one (`idle`) and drops the result.

With one process, no method here communicates. Processes exchange numbers and JSON, never pickles.
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
from chainlora.errors import ChainLoRAError, ConfigError, PeerFailedError, TrainingError
from chainlora.training.interrupts import SIGNALS, stop_requested

Item = TypeVar("Item")
Result = TypeVar("Result")

# The first process may encode a large data set, or score all stages, while the others wait.
PATIENCE = timedelta(hours=6)


class Processes:
    """The processes of a run, as seen by one of them; process 0 writes files."""

    def __init__(
        self, rank: int, count: int, device: torch.device, *, shares_model: bool = False
    ) -> None:
        self.rank, self.count, self.device = rank, count, device
        self.shares_model = shares_model
        self._agreed_signal: int | None = None  # a signal to stop, known to all processes
        self._has_failed = False  # a problem of one process is known to all

    @property
    def is_first(self) -> bool:
        """Say whether this process writes and prints for all."""
        return self.rank == 0

    # --- sharing work ---

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of a batch that this process computes."""
        return items[self.rank :: self.count] if self.count > 1 else items

    def idle(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return one item if this process of a sharded model has no share, to compute and drop."""
        return items[:1] if self.shares_model and not self.share(items) else items[:0]

    def spread(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Return the results of `compute`, JSON values, for all items; each computes a share."""
        if self.count == 1:
            return compute(items)
        share, idle = self.share(items), self.idle(items)
        if idle:
            compute(idle)
        parts = self._gather(compute(share) if share else [])
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            results[rank :: self.count] = part
        return results

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for a step, so that dropout depends only on seed, step and process."""
        torch.manual_seed((seed << 32) + step)
        if self.rank > 0:  # each process has other rows, and must draw another mask
            torch.manual_seed(int(torch.randint(2**62, (self.count,))[self.rank]))

    def most(self, number: int) -> int:
        """Return the largest number over all processes."""
        return number if self.count == 1 else max(self._gather(number))

    # --- one result ---

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over all processes, and agree whether a signal asked to stop."""
        if self.count == 1:
            return list(numbers)
        requested = stop_requested()
        flags = [float(requested == number) for number in SIGNALS]
        tensor = torch.tensor([*numbers, *flags], dtype=torch.float64, device=self.device)
        self._all_reduce(tensor)
        totals = tensor.tolist()
        sums, counts = totals[: len(numbers)], totals[len(numbers) :]
        signals = [number for number, count in zip(SIGNALS, counts, strict=True) if count]
        self._agreed_signal = signals[0] if signals else None
        return sums

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: float = 0.0) -> float:
        """Sum ``parameter.grad`` over all processes, in place; return the sum of `loss`."""
        if self.count == 1:
            return loss
        # one exchange: all gradients, then the loss and a flag for each gradient
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        values = [loss, *(float(p.grad is not None) for p in parameters)]
        tail = torch.tensor(values, dtype=torch.float32, device=self.device)
        flat = torch.cat([*(part.float().flatten() for part in parts), tail])
        self._all_reduce(flat)
        *sums, tail = flat.split([*(part.numel() for part in parts), len(values)])
        total, *num_gradients = tail.tolist()
        for parameter, value, count in zip(parameters, sums, num_gradients, strict=True):
            if count:  # otherwise it stays None
                parameter.grad = value.view_as(parameter).to(parameter.dtype)
        return float(total)

    def stop_requested(self) -> int | None:
        """Return the signal that asked the run to stop, once all processes know it."""
        return stop_requested() if self.count == 1 else self._agreed_signal

    def check_same(self, parameters: Iterable[Tensor]) -> None:
        """Raise TrainingError unless all processes hold the same link, to the bit."""
        if self.count == 1:
            return
        sums = [p.detach().double().sum() for p in parameters]
        digest = [math.fsum(map(float, sums)), float(torch.stack(sums).norm()) if sums else 0.0]
        digests = self._gather(digest)
        if any(other != digests[0] for other in digests):
            got = f"sums {', '.join(str(total) for total, _ in digests)}"
            remedy = "use machines of one kind and the same versions for all of them"
            raise TrainingError("all processes must hold the same link", got, remedy)

    # --- before training ---

    @contextmanager
    def together(self) -> Iterator[None]:
        """Stop all processes if one of them raises; the first process reports the error.

        Inside, processes must communicate only by `in_turn`.
        """
        try:
            yield
        except ChainLoRAError as error:
            if not self._has_failed:
                self._meet(str(error))
            raise
        self._meet()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process go before the others: claim, download, encode."""
        if not self.is_first:
            self._meet()
        yield
        if self.is_first:
            self._meet()

    def _meet(self, problem: str | None = None) -> None:
        """Wait for all processes, and exchange their problems.

        If one of them has a problem, all raise. A process other than the first raises
        PeerFailedError, which it need not report. The first raises a TrainingError, or the caller's
        own error.
        """
        if self.count == 1:
            return
        try:
            problems = self._gather(problem)
        except TrainingError:
            if problem is None:
                raise
            return  # the caller raises the error of this process
        errors = [f"{text} (process {rank})" for rank, text in enumerate(problems) if text]
        self._has_failed = bool(errors)
        if errors and not self.is_first:
            raise PeerFailedError(errors[0])
        if errors and problem is None:
            raise TrainingError(errors[0])

    # --- communication ---

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; they are sent as JSON."""
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
        """Raise a clear error if a forward pass of a sharded model loses another process."""
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
            f"another one: {reason[:120]}); read the error of the other one, then resume"
        )


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Reset Accelerate at the end: a process can set it up only once, and a script may need it."""
    is_new = not AcceleratorState._shared_state
    try:
        yield
    finally:
        if is_new and not distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)


def find_processes(
    accelerator: Accelerator | AcceleratorState, *, share_model: bool = False
) -> Processes:
    """Return the processes of Accelerate; with `share_model`, several of them shard the model."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", *(["FSDP"] if share_model else [])):
        rule = "each process must hold the whole model, or share it by FSDP2"
        remedy = "launch with torchrun, or `accelerate launch` without DeepSpeed, Megatron or TPU"
        raise ConfigError(rule, f"an Accelerate config for {kind}", remedy)
    if accelerator.num_processes != num_launched():
        got = f"{num_launched()} by WORLD_SIZE and {accelerator.num_processes} by Accelerate"
        remedy = "unset WORLD_SIZE, or launch with torchrun; a trainer on CPUs needs use_cpu=True"
        raise ConfigError("all processes must find each other", got, remedy)
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        shares_model=share_model and accelerator.num_processes > 1,
    )


def leave_processes(status: int = 0) -> None:
    """End this process with `status` if it is one of several; do nothing if it is the only one.

    The process exits without teardown of the interpreter. Threads of Gloo may still release
    buffers, which would abort the process in the teardown; `destroy_process_group` does not end
    these threads, because device meshes keep the group.
    """
    if not distributed.is_initialized():
        return
    if status == 0:  # after an error others may be gone, and this call would wait for them
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def num_launched() -> int:
    """Return the number of processes that a launcher has started, by WORLD_SIZE."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def wait_for_all() -> None:
    """Wait for all processes: the first one writes files that the others read next."""
    if num_launched() > 1:
        cpu = not torch.accelerator.is_available()
        with finding_each_other():
            state = PartialState(cpu=cpu, timeout=PATIENCE)
        state.wait_for_everyone()


@contextmanager
def finding_each_other() -> Iterator[None]:
    """Raise ConfigError if some variables of a launcher are missing."""
    try:
        yield
    except ValueError as error:
        # a second attempt raises the same error
        AcceleratorState._reset_state(reset_partial_state=True)
        raise ConfigError(
            "Accelerate must find the processes that the environment names",
            error,
            "launch with torchrun, or unset LOCAL_RANK and WORLD_SIZE",
        ) from error


def is_first_launched() -> bool:
    """Say whether this is the first process of a launcher, which shows progress."""
    return num_launched() < 2 or os.environ.get("RANK", "0") == "0"


# --- a sharded model ---


def wants_shards(config: RunConfig) -> bool:
    """Say whether `train.shard` or `accelerate launch` asks to shard the model.

    Raises ConfigError if Accelerate is set to FSDP1 or DeepSpeed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        got, remedy = "an Accelerate config with DeepSpeed", "set train.shard: fsdp2"
        rule = "processes share a model by `train.shard`"
        raise ConfigError(rule, got, f"launch with torchrun, and {remedy}")
    by_accelerate = _is_set("ACCELERATE_USE_FSDP")
    version = os.environ.get("FSDP_VERSION", "1")
    if by_accelerate and version != "2":
        got = f"an Accelerate config with fsdp_version: {version}"
        remedy = "set fsdp_version: 2, or launch with torchrun and set train.shard: fsdp2"
        raise ConfigError("FSDP must be FSDP2", got, remedy)
    return by_accelerate or config.train.shard is not None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def check_shards(config: RunConfig) -> None:
    """Raise ConfigError for keys that a sharded model does not support."""
    chain = config.chain
    if config.quantize is not None:
        rule = "processes that share a model train plain LoRA on it"
        remedy = "leave it out, or leave train.shard out: each process then holds the whole model"
        raise ConfigError(rule, "quantize, which needs whole weights", remedy)
    if chain.knots is not None and holding_named(chain.hold).writes_base:
        raise ConfigError(
            "soft knots on a shared model need hold: carried (got hold: tied, whose exact weights "
            "no single process can save); set chain.hold: carried"
        )
