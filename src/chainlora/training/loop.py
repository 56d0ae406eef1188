"""Fine-tune a model by a chain of LoRA: the training loop, top to bottom.

`train_stage` is the entry point: prepare the stage, then extend, tune and tie each link, with
evaluation, the best point, checkpoints and resume around it. The rows, learning rate and dropout of
a step are a pure function of the config and the step's number, so a killed run resumes to the same
bits.

Each link gets a new optimizer, with two exceptions: a soft knot keeps the optimizer and scales its
moments (`knots.moments`), and an optimizer of a plug-in may take over the state of the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from chainlora.chain.link import Link
from chainlora.chain.live import SOFT_LINK_TOLERANCE
from chainlora.config.schema import RunConfig
from chainlora.errors import DivergedError, StoppedError, TrainingError
from chainlora.models.modes import in_mode, kept_random_state
from chainlora.runs.loading_start import Start
from chainlora.runs.open_base import OpenBase
from chainlora.training.events import GradientMeasured, KnotTied, Listener, ShareTied
from chainlora.training.optimizers import (
    load_state,
    make_optimizer,
    state_tensors,
    takes_over,
)
from chainlora.training.processes import own_accelerate
from chainlora.training.result import TrainResult, evaluate_point, finish, select_best
from chainlora.training.run import Run
from chainlora.training.setup import prepare
from chainlora.training.step import add_gradients, rate_factor, steps_ahead, update

Moments = dict[str, Tensor]
Loop = Callable[[Run], TrainResult]

# Largest relative change of the hidden states by a knot, in float32. Rounding of a 30-layer model
# stays below 1e-4. A link with soft knots is stored with a relative error of its update
# (`SOFT_LINK_TOLERANCE`), which layers can amplify.
_KNOT_TOLERANCE = 1e-3
_SOFT_KNOT_TOLERANCE = 10 * SOFT_LINK_TOLERANCE


@torch.inference_mode(False)  # record gradients, also inside a caller's inference mode
@own_accelerate()
def train_stage(
    name: str,
    config: RunConfig,
    start: Start,
    listener: Listener,
    *,
    base: OpenBase | None = None,
    loop: Loop | None = None,
) -> TrainResult:
    """Train a stage on `start` to its end, or resume it.

    With an output, the stage must have been declared (`runs.declaring`). `loop` replaces
    `tuned`.
    """
    prepared = prepare(config, listener, start, name, base)
    with prepared as run, run.processes.exchanging(), kept_random_state(run.chain.model):
        return (loop or tuned)(run)


def tuned(run: Run) -> TrainResult:
    """Tune all links of a run, restore the best point, and score the result."""
    if run.progress.step == 0:
        evaluate_point(run, "start")
    tune_chain(run)
    select_best(run)
    return finish(run)


def tune_chain(run: Run) -> None:
    """Extend, tune and tie links (Algorithm 1 of arXiv 2401.04151), with early stop and resume."""
    moments: Moments | None = None
    if run.progress.evaluation_due and not run.is_inside_link:  # a signal stopped it at this knot
        assert run.chain.adapter is not None
        run.engine.adapt(run.chain.adapter.layers.values())
        _evaluate(run)
        run.save_point()
    while run.knots.index < len(run.knots.links):
        run.stop_if_requested()
        if run.progress.stopped and not run.is_inside_link:
            break
        optimizer = _begin_link(run, moments)
        _tune_link(run, optimizer)
        moments = _end_link(run, optimizer)
        _evaluate(run)
        run.save_point()


# --- a link ---


def _begin_link(run: Run, moments: Moments | None) -> torch.optim.Optimizer:
    """Extend the chain, make an optimizer, and load the state of a run that was stopped here.

    `moments` is the optimizer state at the end of the link before.
    """
    config = run.knots.next_link
    adapter = run.chain.extend(config, backward=partial(_add_first_gradients, run))
    run.engine.adapt(adapter.layers.values())
    optimizer = make_optimizer(adapter, run.train)
    if run.knots.index and takes_over(optimizer):
        if moments is None:
            assert run.work is not None
            moments = run.work.load_moments()
        optimizer.take_over(moments)  # type: ignore[attr-defined]
    saved = run.work.load_checkpoint(run.progress) if run.work else None
    if saved is not None:
        state, tensors = saved
        num_steps = run.progress.step - run.knots.first_step
        run.chain.load_live_state(state, num_steps, run.progress.soft_knots)
        load_state(optimizer, tensors)
    return optimizer


def _tune_link(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Train a link to its end; after each step tie a soft knot, evaluate and save if due."""
    if run.progress.evaluation_due:
        _evaluate(run, optimizer)
    knots, factor = run.knots, partial(rate_factor, run.train, run.knots.lengths)
    rate, end = factor(run.progress.step), knots.first_step + knots.length
    with closing(steps_ahead(run, run.progress.step, end)) as steps:
        for work in steps:
            if run.progress.stopped:
                return
            loss = update(run, work, optimizer, rate)
            run.chain.count_step()
            run.last_scored = None
            rate = factor(run.progress.step)
            knot = knots.after_step(loss, rate)
            if knot is not None and knot.ends_link:
                return  # without a checkpoint: a resume would train the link further
            if knot is not None:
                knots.tie_share(knot, optimizer)
                run.record(ShareTied(run.progress.step, knots.index, knot.share))
            _between_steps(run, optimizer)


def _end_link(run: Run, optimizer: torch.optim.Optimizer) -> Moments | None:
    """Tie the link and write it; return the optimizer state that the next optimizer takes over."""
    run.processes.check_same(run.chain.parameters())
    is_soft, before = run.chain.live_soft_knots > 0, _probed(run)
    link = run.chain.tie()
    change = ((_probed(run) - before).norm() / before.norm()).item()
    _check_knot(run, link, change, _SOFT_KNOT_TOLERANCE if is_soft else _KNOT_TOLERANCE)
    run.progress.soft_knots = 0
    run.progress.memory.clear()
    moments = state_tensors(optimizer) if takes_over(optimizer) else None
    if run.work is not None:
        run.work.save_link(link)
        if moments is not None:
            run.work.save_moments(moments)
    run.record(KnotTied(run.progress.step, run.knots.index - 1, change))
    return moments


def _check_knot(run: Run, link: Link, change: float, tolerance: float) -> None:
    """Raise TrainingError if a knot changed the hidden states by more than rounding; relative."""
    if not change < float("inf"):
        raise DivergedError(
            f"the weights must be finite after a link (got others after step {run.progress.step}, "
            f"link {link.index}); the links before it are kept; lower train.lr"
        )
    if change > tolerance and run.train.dtype == "float32":
        # a link with soft knots has a storage error, which shows if its update is very large
        remedy = "lower train.lr" if link.error else "this is a bug, please report the model's name"
        got = f"a relative change of {change:.1e} after link {link.index}"
        raise TrainingError("a knot must preserve the function", got, remedy)


def _probed(run: Run) -> Tensor:
    """Return the hidden states of two rows, to measure how a knot changes the function."""
    rows = [run.splits.train[row] for row in run.batches.batches(0)[0][:2]]
    with run.engine.plain():
        return run.engine.hidden(run.engine.pack(rows)).float()


def _add_first_gradients(run: Run) -> None:
    """Add the gradients of the live link's first batches, for `init: gradient`."""
    assert run.chain.live is not None
    run.engine.adapt(run.chain.live.layers.values())  # the same forward as in training: equal bits
    first, parameters = run.knots.first_step, [*run.chain.parameters()]
    last = min(first + run.config.chain.init_batches, run.batches.num_steps)
    tokens = 0
    with in_mode(run.chain.model), closing(steps_ahead(run, first, last)) as steps:
        for work in steps:
            tokens += add_gradients(run, work, parameters).num_tokens
    run.processes.sum_gradients(parameters)
    if run.progress.step == first:  # do not record it again when a run resumes inside the link
        run.record(GradientMeasured(first, run.knots.index, tokens))


# --- between steps ---


def _between_steps(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Evaluate and save a checkpoint if they are due; stop if a signal asked for it."""
    every = run.train.eval_every
    if every and run.progress.step % every == 0:
        _evaluate(run, optimizer)
    every = run.train.save_every
    if every and run.progress.step % every == 0:
        run.save_checkpoint(optimizer)
    if run.processes.stop_requested() is not None:
        run.save_checkpoint(optimizer)
        run.stop_if_requested()


def _evaluate(run: Run, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Evaluate inside a link, which `optimizer` trains, or at a knot.

    If a signal stops the evaluation, save the state; the resume evaluates again.
    """
    run.progress.evaluation_due = True
    try:
        evaluate_point(run, "knot" if optimizer is None else "step")
    except StoppedError:
        run.save_point() if optimizer is None else run.save_checkpoint(optimizer)
        raise
    run.progress.evaluation_due = False
