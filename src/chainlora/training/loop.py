"""Fine-tune a model by a chain of LoRA: the training loop, top to bottom.

`train_stage` is the one call: check and load everything, then for each link extend, tune and tie,
with evaluation, the best point, checkpoints and resume around it. What a step sees (rows, learning
rate, dropout) is a pure function of the config and the step's number, so a killed run resumes to
the same bits.

Each link gets a new optimizer. Two exceptions, each a function of its own: a soft knot carries the
moments (`knots.moments`), and one of a plug-in may take over what the one before held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from chainlora.chain.link import Link
from chainlora.chain.live import SOFT_LINK_TOLERANCE
from chainlora.config.schema import RunConfig
from chainlora.errors import DivergedError, StoppedError, TrainingError
from chainlora.models.modes import in_mode, kept_random_state
from chainlora.runs.open_base import OpenBase
from chainlora.runs.start import Start
from chainlora.training.events import (
    GradientMeasured,
    KnotTied,
    Listener,
    ShareTied,
)
from chainlora.training.optimizers import (
    evaluated_weights,
    leave_average,
    load_state,
    make_optimizer,
    state_tensors,
    takes_over,
)
from chainlora.training.processes import own_accelerate
from chainlora.training.result import (
    TrainResult,
    evaluate_point,
    finish,
    select_best,
)
from chainlora.training.run import Run
from chainlora.training.setup import prepare
from chainlora.training.step import add_gradients, rate_factor, steps_ahead, update

Moments = dict[str, Tensor]
Loop = Callable[[Run], TrainResult]

# Of the hidden states, in float32. Rounding of a 30-layer model stays below 1e-4. A link with soft
# knots is stored to a relative error of its update, which layers can amplify.
_KNOT_TOLERANCE = 1e-3
_SOFT_KNOT_TOLERANCE = 10 * SOFT_LINK_TOLERANCE


@torch.inference_mode(False)  # wherever it is called, gradients are recorded
@own_accelerate()
def train_stage(
    name: str,
    config: RunConfig,
    start: Start,
    tell: Listener,
    *,
    change: Collection[str] = (),
    base: OpenBase | None = None,
    loop: Loop | None = None,
) -> TrainResult:
    """Train a stage on `start` to its end, by this loop or another; resume one that was stopped.

    It was declared (`runs.declaring`), unless it has no output. `change` names config keys that a
    resume may change.
    """
    prepared = prepare(config, tell, change, start, name, base)
    with prepared as run, run.processes.exchanging(), kept_random_state(run.chain.model):
        return (loop or tuned)(run)


def tuned(run: Run) -> TrainResult:
    """Tune all links of a run, and score what it comes to."""
    if run.progress.step == 0:
        evaluate_point(run, "start")
    tune_chain(run)
    select_best(run)
    return finish(run)


def tune_chain(run: Run) -> None:
    """Extend, tune and tie, from where the run is, until all links are tied or it is to stop."""
    moments: Moments | None = None
    if run.progress.evaluation_due and not run.is_inside_link:
        _return_to_knot(run)
    while run.knots.index < len(run.knots.links):
        run.stop_if_requested()
        if run.progress.stopped and not run.is_inside_link:
            break
        optimizer = _begin_link(run, moments)
        _tune_link(run, optimizer)
        moments = _end_link(run, optimizer)
        _evaluate_at_knot(run)


# --- a link ---


def _begin_link(run: Run, moments: Moments | None) -> torch.optim.Optimizer:
    """Extend the chain, make an optimizer, and find the state of a run that was stopped here.

    `moments` are those of the link before.
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
    """Step until the link's end, and do what is due after each step."""
    if run.progress.evaluation_due:
        _evaluate_inside(run, optimizer)
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
                return  # no checkpoint, from which a link that ends early would go on
            if knot is not None:
                knots.tie_share(knot, optimizer)
                run.record(ShareTied(run.progress.step, knots.index, knot.share))
            _between_steps(run, optimizer)


def _end_link(run: Run, optimizer: torch.optim.Optimizer) -> Moments | None:
    """Tie the link and write it; return what the next optimizer takes over of this one."""
    leave_average(optimizer)
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


def _evaluate_at_knot(run: Run) -> None:
    """Evaluate, and make the links there are the point to resume from. If a signal stops the
    evaluation, they are that too: the resume evaluates."""
    try:
        evaluate_point(run, "knot")
    except StoppedError:
        run.progress.evaluation_due = True
        run.save_point()
        raise
    run.progress.evaluation_due = False
    run.save_point()


def _return_to_knot(run: Run) -> None:
    """Evaluate at the knot where a signal stopped the evaluation."""
    assert run.chain.adapter is not None
    run.engine.adapt(run.chain.adapter.layers.values())
    _evaluate_at_knot(run)


def _check_knot(run: Run, link: Link, change: float, tolerance: float) -> None:
    if not change < float("inf"):
        raise DivergedError(
            f"a link must leave finite weights (got others after step {run.progress.step}, link "
            f"{link.index}); the links before it are kept; lower train.lr"
        )
    if change > tolerance and run.train.dtype == "float32":
        # what a link with soft knots is stored without shows where its update is very large
        remedy = "lower train.lr" if link.error else "this is a bug, please report the model's name"
        got = f"a relative change of {change:.1e} after link {link.index}"
        raise TrainingError("a knot must preserve the function", got, remedy)


def _probed(run: Run) -> Tensor:
    """Return the hidden states of two rows, by which a knot is judged."""
    rows = [run.splits.train[row] for row in run.batches.batches(0)[0][:2]]
    with run.engine.plain():
        return run.engine.hidden(run.engine.pack(rows)).float()


def _add_first_gradients(run: Run) -> None:
    """Add the gradients of the first batches that the live link will see: `init: gradient`."""
    assert run.chain.live is not None
    run.engine.adapt(run.chain.live.layers.values())  # the forward of training: same bits
    first, parameters = run.knots.first_step, [*run.chain.parameters()]
    last = min(first + run.config.chain.init_batches, run.batches.num_steps)
    tokens = 0
    with in_mode(run.chain.model), closing(steps_ahead(run, first, last)) as steps:
        for work in steps:
            tokens += add_gradients(run, work, parameters).num_tokens
    run.processes.sum_gradients(parameters)
    if run.progress.step == first:  # not again where a stopped run resumes inside the link
        run.record(GradientMeasured(first, run.knots.index, tokens))


# --- between steps ---


def _between_steps(run: Run, optimizer: torch.optim.Optimizer) -> None:
    every = run.train.eval_every
    if every and run.progress.step % every == 0:
        _evaluate_inside(run, optimizer)
    every = run.train.save_every
    if every and run.progress.step % every == 0:
        run.save_checkpoint(optimizer)
    if run.processes.stop_requested() is not None:
        run.save_checkpoint(optimizer)
        run.stop_if_requested()


def _evaluate_inside(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Evaluate inside a link. If a signal stops that, save the state: the resume evaluates."""
    run.progress.evaluation_due = True
    try:
        with evaluated_weights(optimizer):
            evaluate_point(run, "step")
    except StoppedError:
        run.save_checkpoint(optimizer)
        raise
    run.progress.evaluation_due = False
