"""Fine-tune a model by a chain of LoRA: the loop around the heart, top to bottom.

`train` is the one call: check and load everything, then for each link extend, tune and tie, with
evaluation, the best point, checkpoints and resume around it. What a step sees (rows, learning rate,
dropout) is a pure function of the config and the step's number, so a killed run resumes to the same
bits.

An optimizer lives as long as one link. Its state is not cleared, it is gone: the next link gets a
new one. Two exceptions, each a function of its own: a soft knot carries the moments
(`carry_moments`), and ReLoRA keeps some of them (`prune_moments`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.chain import SOFT_LINK_TOLERANCE
from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.errors import DivergedError, StoppedError, TrainingError
from chainlora.training.acceptance import gain
from chainlora.training.events import (
    GradientMeasured,
    KnotTied,
    LinkRejected,
    Listener,
    ShareTied,
)
from chainlora.training.knots import Knot, Position
from chainlora.training.optimizers import (
    carry_moments,
    evaluated_weights,
    full_optimizer,
    leave_average,
    load_state,
    make_optimizer,
    prune_moments,
    rate_factor,
    state_tensors,
)
from chainlora.training.result import TrainResult, finish
from chainlora.training.run import Run
from chainlora.training.selection import evaluate_point, score, select_best
from chainlora.training.setup import prepare
from chainlora.training.step import Work, add_gradients, steps_ahead, update

# Of the hidden states, in float32. Rounding of a 30-layer model stays below 1e-4. A link with soft
# knots is stored to a relative error of its update, which layers can amplify.
_KNOT_TOLERANCE = 1e-3
_SOFT_KNOT_TOLERANCE = 10 * SOFT_LINK_TOLERANCE


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    change: Collection[str] = (),
) -> TrainResult:
    """Run a config from data to result and return what ``result.json`` holds.

    Prints nothing; `chainlora.train` (`training.calling`) shows progress.

    `listener` gets every event (`training.events`): `Planned` before the first step, and before it
    `RowsEncoded` while a large data set is tokenised. `change` names keys that a resume may change
    (`runs.resuming.CHANGEABLE`). Everything that can be refused is refused before training. Raises
    ChainLoRAError subclasses.
    """
    ready = prepare(config, resume, listener or (lambda event: None), change)
    with ready as run, run.processes.exchanging():
        if run.progress.step == 0:
            evaluate_point(run, "start")
        if config.chain.tune == "full":
            _tune_everything(run)
        else:
            _tune_chain(run)
            select_best(run)
        return finish(run)


def _tune_chain(run: Run) -> None:
    if run.progress.evaluation_due and not _is_inside_link(run):
        _resume_at_knot(run)
    for index in range(len(run.chain), len(run.config.chain.ranks)):
        run.stop_if_requested()
        if run.progress.stopped and not _is_inside_link(run):
            break
        optimizer = _begin_link(run, index)
        _tune_link(run, optimizer)
        _end_link(run, optimizer)


def _tune_link(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Step until the policy ends the link, tying shares of it on the way."""
    link = len(run.chain)
    first, num_steps = run.first_step(link), run.lengths[link]
    knot: Knot | None = None
    if run.progress.evaluation_due:
        _evaluate_inside(run, optimizer)

    def advance(work: Work) -> None:
        nonlocal knot
        loss = update(run, work, optimizer)
        knot = run.policy.knot_after(_position(run, first, num_steps, loss))
        if knot is not None and not knot.ends_link:
            _tie_share(run, optimizer, knot)
        _between_steps(run, optimizer, is_last=knot is not None and knot.ends_link)

    with closing(steps_ahead(run, run.progress.step, first + num_steps)) as ahead:
        run.chain.tune(_until(ahead, lambda: knot is not None and knot.ends_link), advance)


def _position(run: Run, first: int, num_steps: int, loss: float) -> Position:
    link = len(run.chain)
    is_last = link == len(run.plan.lengths) - 1
    return Position(
        link,
        run.progress.step - first,
        num_steps,
        loss,
        rate=rate_factor(run.train, run.lengths, run.progress.step),
        is_last=is_last,
        norm=run.chain.live_norm,
        memory=run.progress.memory,
    )


def _until(steps: Iterable[Work], ended: Callable[[], bool]) -> Iterator[Work]:
    for step in steps:
        yield step
        if ended():
            return


# --- knots ---


def _begin_link(run: Run, index: int) -> torch.optim.Optimizer:
    """Extend the chain, make an optimizer, and find the state of a run that was stopped here."""
    if run.train.accept_links == "better" and run.accepted is None:
        run.accepted = run.last_scored or score(run, run.splits.validation)
    config = run.config.chain.links()[index]
    adapter = run.chain.extend(config, backward=_gradient_batches(run, index))
    run.engine.adapt(adapter.layers.values())
    optimizer = make_optimizer(adapter, run.train)
    if index and run.train.optimizer_reset == "prune":
        kept = run.kept_moments or _directory_moments(run)
        load_state(optimizer, prune_moments(kept, run.train.prune_fraction))
    saved = run.directory.load_checkpoint(run.progress, config) if run.directory else None
    if saved is not None:
        state, tensors = saved
        run.chain.load_live_state(
            state, run.progress.step - run.first_step(index), run.progress.soft_knots
        )
        load_state(optimizer, tensors)
    return optimizer


def _tie_share(run: Run, optimizer: torch.optim.Optimizer, knot: Knot) -> None:
    adapter = run.chain.live
    assert adapter is not None
    scales = run.chain.tie_share(knot.share)
    if knot.moments == "carried":
        carry_moments(optimizer, adapter, scales)
    else:
        optimizer.state.clear()  # step counts included: the next update is that of a new optimizer
    run.progress.soft_knots += 1
    run.last_scored = None
    run.record(ShareTied(run.progress.step, len(run.chain), knot.share))


def _end_link(run: Run, optimizer: torch.optim.Optimizer) -> None:
    leave_average(optimizer)
    run.processes.check_same(run.chain.parameters(), "link")
    index, probe = len(run.chain), _probe_batch(run)
    before = _hidden(run, probe)
    if run.train.optimizer_reset == "prune":
        run.kept_moments = state_tensors(optimizer)
    link = run.chain.tie()
    change = ((_hidden(run, probe) - before).norm() / before.norm()).item()
    _check_knot(run, index, change)
    run.progress.lengths = [*run.lengths[:index], run.progress.step - run.first_step(index)]
    run.progress.link, run.progress.soft_knots, run.progress.memory = index + 1, 0, {}
    run.record(KnotTied(run.progress.step, index, change))
    try:
        evaluate_point(run, "knot")
    except StoppedError:
        run.progress.evaluation_due = True
        _save_link(run, link)
        run.write_manifest()
        raise
    if _is_accepted(run, index):
        _save_link(run, link)
    else:
        _reject(run, index)
    run.write_manifest()


def _resume_at_knot(run: Run) -> None:
    """Evaluate at the knot where a signal stopped the evaluation; its link is on disk."""
    index = len(run.chain) - 1
    assert run.chain.adapter is not None
    run.engine.adapt(run.chain.adapter.layers.values())
    if run.train.accept_links == "better":
        links = run.chain.drop(1)
        run.accepted = score(run, run.splits.validation)
        run.chain.add(*links)
    evaluate_point(run, "knot")
    run.progress.evaluation_due = False
    if not _is_accepted(run, index):
        _reject(run, index)
    run.write_manifest()


def _save_link(run: Run, link: Link) -> None:
    """Write a link that was tied, and the moments that go over its knot."""
    if run.directory is not None:
        run.directory.save_link(link, run.config.model)
        if run.kept_moments is not None:
            run.directory.save_moments(run.kept_moments)


def _is_accepted(run: Run, index: int) -> bool:
    """Say whether the link just tied is worth keeping, and remember what it scored."""
    if run.accepted is None:  # all links are
        return True
    assert run.last_scored is not None
    found = gain(run.accepted, run.last_scored)
    if found.is_clear:
        run.accepted = run.last_scored
        return True
    run.record(LinkRejected(run.progress.step, index, found.mean, found.standard_error))
    return False


def _reject(run: Run, index: int) -> None:
    """Drop the link just tied, and end the chain before it."""
    run.chain.drop(1)
    run.progress.link, run.progress.lengths = index, run.progress.lengths[:index]
    run.progress.stopped = True
    run.last_scored = run.accepted


def _check_knot(run: Run, index: int, change: float) -> None:
    """Raise if a knot did not preserve the function."""
    tolerance = _SOFT_KNOT_TOLERANCE if run.progress.soft_knots else _KNOT_TOLERANCE
    if not change < float("inf"):
        raise DivergedError(
            f"a link must leave finite weights (got others after step {run.progress.step}, link "
            f"{index}); the links before it are kept; lower train.lr"
        )
    if change > tolerance and run.train.dtype == "float32":
        raise TrainingError(
            f"a knot must preserve the function (got a relative change of {change:.1e} after link "
            f"{index}); this is a bug, please report it with the model's name"
        )


def _probe_batch(run: Run) -> Any:
    rows = run.plan.batches(0)[0][:2]
    return run.engine.pack([run.splits.train[row] for row in rows])


@torch.no_grad()
def _hidden(run: Run, batch: Any) -> Tensor:
    model = run.chain.model
    training = model.training
    model.eval()
    hidden = run.engine.hidden(batch).float()
    model.train(training)
    return hidden


def _gradient_batches(run: Run, index: int) -> Callable[[], None]:
    """Return what `init: gradient` calls: gradients of the first batches the link will see."""
    first = run.first_step(index)
    last = min(first + run.config.chain.init_batches, run.plan.num_steps)

    def backward() -> None:
        adapter = run.chain.live
        assert adapter is not None
        run.engine.adapt(adapter.layers.values())  # the forward that training will use: same bits
        training, tokens = run.chain.model.training, 0
        run.chain.model.eval()
        parameters = list(run.chain.parameters())
        with closing(steps_ahead(run, first, last)) as steps:
            for work in steps:
                tokens += add_gradients(run, work, parameters).num_tokens
        run.processes.sum_gradients(parameters)
        run.chain.model.train(training)
        if run.progress.step == first:  # not again where a stopped run resumes inside the link
            run.record(GradientMeasured(first, index, tokens))

    return backward


# --- between steps ---


def _between_steps(run: Run, optimizer: torch.optim.Optimizer, *, is_last: bool) -> None:
    train, step = run.train, run.progress.step
    if train.eval_every and step % train.eval_every == 0 and not is_last:
        _evaluate_inside(run, optimizer)
    if train.save_every and step % train.save_every == 0:
        save_checkpoint(run, optimizer)
    if not is_last and run.processes.stop_requested() is not None:  # a knot is saved anyway
        save_checkpoint(run, optimizer)
        run.stop_if_requested()


def _evaluate_inside(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Evaluate inside a link. If a signal stops that, save the state: the resume evaluates."""
    run.progress.evaluation_due = True
    try:
        with evaluated_weights(optimizer):
            evaluate_point(run, "step")
    except StoppedError:
        save_checkpoint(run, optimizer)
        raise
    run.progress.evaluation_due = False


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Save the live link, its optimizer and the progress."""
    if run.directory is not None and run.chain.live is not None:
        run.progress.seconds = run.clock.seconds
        run.directory.save_checkpoint(
            run.chain.live_state(), state_tensors(optimizer), run.progress
        )


def _is_inside_link(run: Run) -> bool:
    """Say whether a stopped run resumes inside a link, which must still be tied."""
    return run.directory is not None and run.directory.has_checkpoint(run.progress)


def _directory_moments(run: Run) -> dict[str, Tensor]:
    assert run.directory is not None
    return run.directory.load_moments()


# --- the rival that trains every weight ---


def _tune_everything(run: Run) -> None:
    """Full fine-tuning: float32 only, no links, no checkpoints."""
    model = run.chain.model
    model.requires_grad_(True)
    optimizer = full_optimizer(model.parameters(), run.train)
    with closing(steps_ahead(run, 0, run.plan.num_steps)) as steps:
        for work in steps:
            update(run, work, optimizer)
            _between_steps(run, optimizer, is_last=run.progress.step == run.plan.num_steps)
    leave_average(optimizer)
    model.requires_grad_(False)
    evaluate_point(run, "knot")
