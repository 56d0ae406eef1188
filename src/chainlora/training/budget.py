"""A chain that is given minutes: measure a step, and fix the steps of every link.

The speed is measured once, before the first step, and the lengths are recorded with the run. So
what a step sees stays a pure function of its number, and a run that is resumed, perhaps on another
machine, has the lengths that it began with. The minutes are those of steps: loading, evaluations
and checkpoints come on top.
"""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from dataclasses import replace

from chainlora.training.optimizers import make_optimizer
from chainlora.training.run import Run
from chainlora.training.step import add_gradients, steps_ahead

_WARM_UP, _TIMED = 2, 6  # steps


def fix_lengths(run: Run) -> None:
    """Give the links of a chain the steps that their minutes allow; others are left as they are."""
    minutes = run.config.chain.minutes
    if minutes is None:
        return
    if not run.progress.planned:
        seconds = measure_step(run)
        run.progress.planned = [max(1, round(60 * each / seconds)) for each in minutes]
        run.write_manifest()
    run.plan = replace(run.plan, lengths=tuple(run.progress.planned))


def measure_step(run: Run) -> float:
    """Return the median seconds of an optimizer step, on a link that is discarded."""
    link = run.config.chain.links()[0]
    plain = link.model_copy(update={"init": "kaiming"})  # no start costs a step anything
    adapter = run.chain.extend(plain)
    run.engine.adapt(adapter.layers.values())
    run.chain.model.train()
    optimizer, parameters = make_optimizer(adapter, run.train), list(run.chain.parameters())
    seconds = []
    with closing(steps_ahead(run, 0, _WARM_UP + _TIMED)) as steps:
        for work in steps:
            started = time.perf_counter()
            loss = add_gradients(run, work, parameters).loss
            run.processes.sum_gradients(parameters, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
    run.chain.discard()
    median = statistics.median(seconds[_WARM_UP:])
    return run.processes.sum([median])[0] / run.processes.count
