"""Evaluation while training: the best point over the whole chain, links and partial link
together."""

from __future__ import annotations

from dataclasses import replace

from chainlora.chain.verbs import add_link, drop_links, live_link
from chainlora.data.examples import Example
from chainlora.evaluation.evaluate import Evaluation, evaluate
from chainlora.evaluation.metrics import is_higher_better
from chainlora.runs import directory as store
from chainlora.training.run import Run, record


def evaluate_point(run: Run, where: str) -> None:
    """Score the model as it is on the validation rows, record it, and note whether it is the best
    so far.

    `where` is ``start``, ``step`` or ``knot``. Without gain for `early_stop` evaluations the run is
    to stop.
    """
    if not run.splits.validation or (where != "step" and not run.config.train.eval_at_knots):
        return
    evaluation = score(run, run.splits.validation)
    run.last_scored = evaluation
    record(
        run,
        {
            "event": "eval",
            "step": run.progress.step,
            "link": max(0, len(run.chain) - (where == "knot")),
            "where": where,
        }
        | evaluation.metrics,
    )
    if where == "start":
        return
    progress, name = run.progress, run.config.train.select_metric or run.splits.metric
    value = evaluation.metrics[name]
    sign = 1 if is_higher_better(name) else -1
    if progress.best is None or sign * value > sign * progress.best["value"]:
        live = run.chain.live is not None
        progress.best = {
            "step": progress.step,
            "num_links": len(run.chain),
            "partial": live,
            "metric": name,
            "value": value,
        }
        progress.evaluations_without_gain = 0
        if run.config.train.keep_best and live:
            run.best_link = live_link(run.chain)
            if run.directory is not None:
                run.directory.save_link_to("best", run.best_link, run.config.model)
    else:
        progress.evaluations_without_gain += 1
        if (
            run.config.train.early_stop
            and progress.evaluations_without_gain >= run.config.train.early_stop
        ):
            progress.stopped = True


def score(run: Run, examples: list[Example]) -> Evaluation:
    """Score rows by the metrics of the run's task."""
    return evaluate(
        run.chain.model,
        examples,
        metrics=run.splits.metrics,
        tokenizer=run.tokenizer,
        path=run.path,
        stop=run.splits.stop,
        max_new_tokens=run.splits.max_new_tokens,
    )


def select_best(run: Run) -> None:
    """Put the best point over the whole chain back, links and partial link together, if the config
    keeps it."""
    best = run.progress.best
    if not run.config.train.keep_best or best is None:
        return
    if best["num_links"] == len(run.chain) and not best["partial"]:
        run.best_link = None
        return
    run.last_scored = None
    partial = run.best_link
    if best["partial"] and partial is None and run.directory is not None:  # saved before a kill
        config = run.config.chain.links()[best["num_links"]]
        partial = store.read_link(
            run.directory / "best",
            {"index": best["num_links"], "num_steps": 0, "config": config.model_dump(mode="json")},
        )
    drop_links(run.chain, len(run.chain) - best["num_links"])
    if best["partial"] and partial is not None:
        partial = replace(partial, num_steps=best["step"] - run.plan.first_step(best["num_links"]))
        add_link(run.chain, partial)
    run.best_link = partial if best["partial"] else None
