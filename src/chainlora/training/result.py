"""Score a run in training, select its best point, and write ``result.json`` at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.data.examples import Example
from chainlora.data.rows import Rows
from chainlora.errors import DivergedError, ScoreError
from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.metrics import INDEX_METRICS, is_higher_better, majority_rate
from chainlora.runs.addresses import begun_stage
from chainlora.runs.costs import hardware, num_trained, peak_memory_mb, versions
from chainlora.runs.draft import Best
from chainlora.training.events import Evaluated, Scored
from chainlora.training.run import Run

RESULT_FORMAT = 1  # of result.json


class TrainResult(TypedDict):
    """The result of a stage: `train` returns it, and ``result.json`` stores it."""

    format: int
    model: str
    task: str | None
    stage: str
    metrics: dict[str, dict[str, float]]  # by split: validation, test
    best: Best | None  # the best point, if points were compared
    links: list[dict[str, Any]]  # of this stage
    steps: int
    tokens: int  # read by the model, prompts included
    scored_tokens: int  # tokens in the loss
    rows: int  # training rows
    rows_digest: str
    data: dict[str, dict[str, Any]]  # by split: counts of rows and tokens (`Splits.report`)
    base_fingerprint: str
    wall_s: float  # seconds, with those before a resume
    peak_memory_mb: int | None  # MiB, of the GPU or of the process
    trainable_parameters: int  # of the largest link
    versions: dict[str, str]
    hardware: dict[str, Any]


# --- in training ---


def evaluate_point(run: Run, where: Literal["start", "step", "knot"]) -> None:
    """Score the current model on the validation rows, record the scores, keep the best point."""
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
    """Score rows by the metrics of the run's task; a signal stops a run with an output."""

    def between_batches(done: int, rows: int) -> None:
        # several processes must stop at the same point, so they finish an evaluation first
        if run.work is not None and run.processes.count == 1 and done < rows:
            run.stop_if_requested()

    if run.work is not None:
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
    count, partial = best["num_links"], None
    if count == run.knots.index and not best["partial"]:
        run.best_link = None
        return
    run.last_scored = None
    if best["partial"]:
        partial = run.best_link
        if partial is None:  # the run was resumed since then
            assert run.work is not None
            partial = run.work.load_best(run.knots.links[count], best["directory"])
        before = sum(link.num_steps for link in run.chain.links[run.first : run.first + count])
        steps, error = best["step"] - before, best.get("error", 0.0)
        partial = replace(partial, num_steps=steps, error=error)
    run.chain.drop(run.knots.index - count)
    if partial is not None:
        run.chain.add(partial)
    run.best_link = partial


def _keep_point(run: Run, metric: str, value: float) -> None:
    """Note the current point as the best one; write its live link if the config keeps it."""
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


# --- at the end ---


def finish(run: Run) -> TrainResult:
    """Score the final model, write ``result.json``, and give the stage its state in the history."""
    metrics = _final_metrics(run)
    run.count_seconds()
    result = _result(run, metrics)
    if run.work is not None:
        best = run.progress.best
        end: tuple[int, Link | None] | None = None
        if run.train.keep_best and best is not None:
            partial = run.chain.links[-1] if run.best_link is not None else None
            end = best["num_links"], partial  # the run ends at the best point
        run.work.end(result, end)
    return result


def result_of(config: RunConfig, stage: str) -> TrainResult:
    """Return the checked result of a finished stage."""
    finished = begun_stage(Path(config.output or ""), stage)
    assert finished is not None
    return cast(TrainResult, finished.result())


def _final_metrics(run: Run) -> dict[str, Any]:
    """Return the metrics of the validation and test rows, with the rate of the majority class."""
    metrics: dict[str, Any] = {}
    for name in ("validation", "test"):
        examples: Rows = getattr(run.splits, name)
        if not examples:
            continue
        known = run.last_scored if name == "validation" else None
        scored = known or score(run, examples)
        metrics[name] = dict(scored.metrics)
        run.listener(Scored(run.progress.step, name, scored.predictions))
        if run.splits.metric in INDEX_METRICS:
            metrics[name]["majority"] = majority_rate(examples, run.splits.metric)
    return metrics


def _result(run: Run, metrics: dict[str, Any]) -> TrainResult:
    config, progress = run.config, run.progress
    links = run.chain.links[run.first :]  # of this stage
    return {
        "format": RESULT_FORMAT,
        "model": config.model,
        "task": config.data.task,
        "metrics": metrics,
        "best": progress.best,
        "stage": run.stage,
        "links": [
            {
                "link": place,
                "rank": link.rank,
                "scaling": link.config.scaling,
                "num_steps": link.num_steps,
                "error": link.error,
                "config": link.config.model_dump(mode="json"),
            }
            for place, link in enumerate(links)
        ],
        "steps": progress.step,
        "tokens": progress.tokens,
        "scored_tokens": progress.scored_tokens,
        "rows": run.batches.mixture.num_rows,
        "rows_digest": run.splits.digest,
        "data": run.splits.report(),
        "base_fingerprint": run.chain.base_fingerprint,
        "wall_s": round(progress.seconds, 2),
        "peak_memory_mb": peak_memory_mb(run.processes.device),
        "trainable_parameters": max(map(num_trained, links), default=0),
        "versions": versions(),
        "hardware": hardware(run.processes.device),
    }
