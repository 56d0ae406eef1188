"""One optimizer step: pack rows, add gradients, update the factors.

Rows are packed in a thread while the step before runs. The learning rate is `train.lr` times a pure
function of the step (`rate_factor`): the schedules of transformers, such as
``get_linear_schedule_with_warmup``, once for the whole chain or again for each link.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chainlora.config.schema import TrainConfig
from chainlora.data.examples import Example
from chainlora.errors import DivergedError
from chainlora.training.events import StepDone
from chainlora.training.run import Run

logger = logging.getLogger(__name__)


class StepWork(NamedTuple):
    """The packed rows of a step."""

    step: int
    batches: list[list[Any]]  # of each micro-batch; a thread takes one batch at a time
    idle: list[list[Any]]  # micro-batches whose result is dropped (`Processes.idle`)
    num_scored_tokens: int  # sum of `Example.num_learned`

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for shards in self.batches for batch in shards)


def steps_ahead(run: Run, begin: int, end: int) -> Generator[StepWork, None, None]:
    """Yield the work of steps [begin, end); each is packed while the step before it runs."""

    def pack(step: int) -> StepWork:
        batches = run.batches.batches(step)
        shares = [read(run.processes.share(batch)) for batch in batches]
        idle = [read(run.processes.idle(batch)) for batch in batches]
        learned = sum(row.num_learned for share in shares for row in share)
        return StepWork(step, collated(shares), collated(idle), learned)

    def read(rows: Sequence[int]) -> list[Example]:
        return [run.splits.train[row] for row in rows]

    def collated(shares: Sequence[list[Example]]) -> list[list[Any]]:
        return [run.objective.collate(run.engine, share) for share in shares if share]

    with ThreadPoolExecutor(1) as packer:
        packed = (packer.submit(pack, step) for step in range(begin, end))
        ahead = next(packed, None)
        while ahead is not None:
            work, ahead = ahead.result(), next(packed, None)
            yield work


class Computed(NamedTuple):
    loss: float  # this process's part of the mean over all terms
    num_tokens: int  # of all processes
    num_scored_tokens: int


def add_gradients(run: Run, work: StepWork, parameters: list[nn.Parameter]) -> Computed:
    """Add this process's part of the gradient of the step's mean loss to ``parameter.grad``."""
    local_terms = sum(run.objective.count(batch) for shards in work.batches for batch in shards)
    counts = run.processes.sum([local_terms, work.num_tokens, work.num_scored_tokens])
    terms, num_tokens, num_scored_tokens = map(int, counts)  # of all processes
    compute = partial(
        run.engine.add_gradients,
        parameters=parameters,
        loss=lambda batch: run.objective.loss(run.engine, batch),
        count=run.objective.count,
    )
    loss = compute(work.batches, terms=terms)
    compute(work.idle, terms=math.inf)  # weight 1/terms = 0
    return Computed(loss, num_tokens, num_scored_tokens)


def update(run: Run, work: StepWork, optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Make a step on `work` at `rate`, a share of `train.lr`; record and return the loss."""
    started, step = time.perf_counter(), work.step
    run.processes.seed(run.train.seed, step)  # dropout is a function of the step alone
    run.chain.model.train()
    for group in optimizer.param_groups:
        group["lr"] = run.train.lr * rate * group["ratio"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    local_loss, num_tokens, num_scored_tokens = add_gradients(run, work, parameters)
    loss = run.processes.sum_gradients(parameters, local_loss)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    _check_finite(run, step, "the loss and the norm of its gradient", loss, norm)
    if run.train.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, run.train.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _check_finite(run, step, "the norm of the weights", nn.utils.get_total_norm(parameters))
    run.progress.step = step + 1
    run.progress.tokens += num_tokens
    run.progress.scored_tokens += num_scored_tokens
    seconds = time.perf_counter() - started
    link, lr = run.knots.index, run.train.lr * rate
    run.record(StepDone(step + 1, link, loss, lr, norm.item(), num_tokens, seconds))
    return loss


def _check_finite(run: Run, step: int, what: str, *values: float | Tensor) -> None:
    """Raise DivergedError unless all values are finite. Files on disk stay unchanged."""
    if all(math.isfinite(value) for value in values):
        return
    got = ", ".join(str(float(value)) for value in values)
    kept = f"; the last good state is kept in {run.work.folder}" if run.work else ""
    raise DivergedError(
        f"{what} must be finite (got {got} at step {step + 1}, link {run.knots.index}){kept}; "
        "lower train.lr, or check the rows of this step"
    )


# --- learning rate ---


def rate_factor(config: TrainConfig, lengths: Sequence[int], step: int) -> float:
    """Return the share of `train.lr` at `step` of a chain of links of `lengths` steps.

    Steps count from 0 over the whole chain. Step 0 of a warm-up has factor 0, as in transformers.
    With `restart_schedule`, the schedule starts again at each link.
    """
    kind, warmup = config.schedule, config.warmup_steps
    ends = list(accumulate(lengths))
    if not config.restart_schedule:
        return _factor(step, ends[-1], kind, warmup)
    link = min(bisect_right(ends, step), len(ends) - 1)  # a step past the end: the last link
    within = step - (ends[link] - lengths[link])
    return _factor(within, lengths[link], kind, restart_warmup(config) if link else warmup)


def restart_warmup(config: TrainConfig) -> int:
    """Return the number of warm-up steps of every link after the first."""
    if config.restart_warmup_steps is not None:
        return config.restart_warmup_steps
    return config.warmup_steps if config.restart_schedule else 0


def warn_of_long_warmup(config: TrainConfig, lengths: Sequence[int]) -> None:
    """Warn if a link, or the whole chain, ends before its warm-up."""
    schedules = lengths if config.restart_schedule else [sum(lengths)]
    for link, num_steps in enumerate(schedules):
        warmup = restart_warmup(config) if link else config.warmup_steps
        if 0 < num_steps <= warmup:
            place = f"link {link}" if config.restart_schedule else "the chain"
            key = "restart_" if link and config.restart_warmup_steps is not None else ""
            logger.warning(
                f"{place} never reaches `train.lr`: its warm-up takes {warmup} of {num_steps} "
                f"steps; lower train.{key}warmup_steps"
            )
            return


def _factor(step: int, num_steps: int, kind: str, warmup_steps: int) -> float:
    """Return the factor of one schedule: linear from 0 in the warm-up, then by `kind`."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
