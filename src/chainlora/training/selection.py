"""Evaluation while training, and the best point over the whole chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from chainlora.chain.link import Link
from chainlora.data.examples import Example
from chainlora.errors import DivergedError, ScoreError
from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.metrics import is_higher_better
from chainlora.training.events import Evaluated
from chainlora.training.run import Run


def evaluate_point(run: Run, where: Literal["start", "step", "knot"]) -> None:
    """Score the model as it is on the validation rows and record it; note whether it is the best.

    After `early_stop` evaluations without improvement the run is to stop.
    """
    if not run.splits.validation or (where != "step" and not run.train.eval_at_knots):
        return
    evaluation = score(run, run.splits.validation)
    run.last_scored = evaluation
    link = max(0, run.knots.index - (where == "knot"))
    run.record(Evaluated(run.progress.step, link, where, evaluation.metrics))
    if where == "start":
        return
    name = run.train.select_metric or run.splits.metric
    value, best = evaluation.metrics[name], run.progress.best
    sign = 1 if is_higher_better(name) else -1
    if best is None or sign * value > sign * best["value"]:
        _keep_point(run, name, value)
    else:
        run.progress.evaluations_without_gain += 1
        patience = run.train.early_stop
        if patience and run.progress.evaluations_without_gain >= patience:
            run.progress.stopped = True


def score(run: Run, examples: Sequence[Example]) -> Evaluation:
    """Score rows by the metrics of the run's task.

    Where the run can be resumed, a signal stops it after the batch at hand: StoppedError. Several
    processes must stop alike, so they finish an evaluation that they have begun.
    """

    def between_batches(done: int, rows: int) -> None:
        if run.is_resumable and run.processes.count == 1 and done < rows:
            run.stop_if_requested()

    if run.is_resumable:
        run.stop_if_requested()
    try:
        return run.objective.evaluate(
            run.engine,
            examples,
            metrics=run.splits.metrics,
            tokenizer=run.tokenizer,
            stop=run.splits.stop,
            max_new_tokens=run.splits.max_new_tokens,
            progress=between_batches,
        )
    except ScoreError as error:
        if run.progress.step == 0:
            raise
        raise DivergedError(f"{error}, or lower train.lr") from None


def select_best(run: Run) -> None:
    """Restore the best point over the whole chain, if the config keeps it."""
    best = run.progress.best
    if not run.train.keep_best or best is None:
        return
    if best["num_links"] == run.knots.index and not best["partial"]:
        run.best_link = None
        return
    run.last_scored = None
    partial = _partial_link(run)
    run.chain.drop(run.knots.index - best["num_links"])
    if partial is not None:
        run.chain.add(partial)
    run.best_link = partial


def leave_dropped_link(run: Run) -> None:
    """Name the end of the links that are kept, if the best point lay in the one just dropped."""
    best, step = run.progress.best, run.knots.first_step
    if best is None or best["step"] <= step:
        return
    run.progress.best = None  # as at the start, which is no point to go back to
    if step and run.accepted is not None:
        run.progress.best = {
            "step": step,
            "num_links": run.knots.index,
            "partial": False,
            "metric": best["metric"],
            "value": run.accepted.metrics[best["metric"]],
        }


def _keep_point(run: Run, metric: str, value: float) -> None:
    is_partial = run.chain.live is not None
    run.progress.evaluations_without_gain = 0
    run.progress.best = {
        "step": run.progress.step,
        "num_links": run.knots.index,
        "partial": is_partial,
        "metric": metric,
        "value": value,
    }
    if run.train.keep_best and is_partial:
        run.best_link = run.chain.live_link()
        run.progress.best["error"] = run.best_link.error
        if run.work is not None:
            run.work.save_best(run.best_link, run.progress)


def _partial_link(run: Run) -> Link | None:
    """Return the best point's partial link, from disk where the run was stopped since then."""
    best = run.progress.best
    assert best is not None
    if not best["partial"]:
        return None
    partial, count = run.best_link, best["num_links"]
    if partial is None:
        assert run.work is not None
        partial = run.work.load_best(run.knots.links[count], best["directory"])
    before = sum(link.num_steps for link in run.chain.links[run.first : run.first + count])
    steps, error = best["step"] - before, best.get("error", 0.0)
    return replace(partial, num_steps=steps, error=error)
