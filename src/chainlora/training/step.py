"""One step: its rows packed, by micro-batch and piece, and the gradient of their loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chainlora.engine.head import candidate_loss, completion_loss, logit_transform
from chainlora.engine.hidden_states import hidden_states
from chainlora.engine.packing import PackedBatch, pack
from chainlora.engine.threads import split
from chainlora.training.run import Run


class Work(NamedTuple):
    """What a step computes: for every micro-batch, its pieces."""

    step: int
    batches: list[list[PackedBatch]]


def packed_steps(run: Run, packer: ThreadPoolExecutor, begin: int, end: int) -> Iterator[Work]:
    """Yield the work of steps [begin, end), each packed while the step before it runs."""

    def ready(step: int) -> Work:
        return Work(step, [_pieces(run, rows) for rows in run.plan.batches(step)])

    ahead = packer.submit(ready, begin) if begin < end else None
    for step in range(begin, end):
        if run.progress.stopped or ahead is None:
            return
        work = ahead.result()
        ahead = packer.submit(ready, step + 1) if step + 1 < end else None
        yield work


def _pieces(run: Run, rows: list[int]) -> list[PackedBatch]:
    pieces = split([run.splits.train[row] for row in rows], run.lanes.count)
    return [pack_rows(run, [rows[place] for place in piece]) for piece in pieces]


def pack_rows(run: Run, rows: Sequence[int]) -> PackedBatch:
    """Return training rows as one packed batch on the run's device."""
    return pack([run.splits.train[row] for row in rows]).to(run.accelerator.device)


def summed_loss(run: Run, batch: PackedBatch) -> Tensor:
    """Return the loss of a packed batch summed over its examples or scored tokens, a scalar."""
    model = run.chain.model
    hidden = hidden_states(model, batch, path=run.path)
    if run.splits.loss == "candidates":
        return candidate_loss(model, hidden, batch)
    return completion_loss(model, hidden, batch)[0]


def add_gradients(run: Run, work: Work, parameters: list[nn.Parameter]) -> float:
    """Add the gradient of the step's mean loss to ``parameter.grad`` of each; return that loss.

    The losses and gradients of pieces are summed in the order of the pieces, so equal work gives
    equal bits.
    """
    batches = [batch for pieces in work.batches for batch in pieces]
    count = sum(_count(run, batch) for batch in batches)
    total = 0.0
    logit_transform(run.chain.model)  # found by a probe once, and not by two lanes at a time
    for pieces in work.batches:
        if len(pieces) == 1:
            loss = summed_loss(run, pieces[0]) / count
            run.accelerator.backward(loss)
            total += loss.item()
            continue
        for part, gradients in run.lanes.map(
            lambda batch: _gradients(run, batch, count, parameters), pieces
        ):
            total += part
            _accumulate(parameters, gradients)
    return total


def _gradients(
    run: Run, batch: PackedBatch, count: int, parameters: list[nn.Parameter]
) -> tuple[float, tuple[Tensor | None, ...]]:
    with torch.enable_grad():
        loss = summed_loss(run, batch) / count
        return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True)


def _accumulate(parameters: list[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    sums, terms = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            sums.append(parameter.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)


def _count(run: Run, batch: PackedBatch) -> int:
    return (
        batch.num_examples if run.splits.loss == "candidates" else int(batch.token_target.numel())
    )
