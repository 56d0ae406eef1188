"""The end of a run: final metrics, what it cost, and the files that say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.data.rows import Rows
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.runs.costs import hardware, num_trained, peak_memory_mb, versions
from chainlora.runs.draft import Best
from chainlora.runs.state import OpenState
from chainlora.runs.work import Work
from chainlora.training.events import Scored
from chainlora.training.plan import begun_stage
from chainlora.training.processes import is_first_launched
from chainlora.training.run import Run
from chainlora.training.selection import score

RESULT_FORMAT = 1  # of result.json


class TrainResult(TypedDict):
    """What a run came to: what `train` returns and ``result.json`` holds."""

    format: int
    model: str
    task: str | None
    stage: str
    metrics: dict[str, dict[str, float]]  # by split: validation, test
    best: Best | None  # the best point, where points were compared
    links: list[dict[str, Any]]
    steps: int
    tokens: int  # computed, prompts included
    scored_tokens: int  # of those, what the loss is on
    rows: int  # of training
    rows_digest: str
    data: dict[str, dict[str, Any]]  # by split: rows, tokens, what was cut or split, not read
    base_fingerprint: str
    wall_s: float  # seconds, those before a resume included
    peak_memory_mb: int | None  # MiB, of the GPU or of the process
    trainable_parameters: int  # of the largest link
    versions: dict[str, str]
    hardware: dict[str, Any]


def needs_judgement(stage: OpenState) -> bool:
    """Say whether the rows of earlier stages are to choose the strength of a stage
    (`train.accept_links`)."""
    return isinstance(stage.config().train.accept_links, float) and len(stage.columns) > 1


def finish(run: Run) -> TrainResult:
    """Score the result and write ``result.json``, return what that holds, and publish the stage
    unless it is to be judged."""
    metrics = _final_metrics(run)
    run.count_seconds()
    result = _result(run, metrics)
    run.engine.close()  # the model's own forwards, before it is saved
    if run.work is not None:
        if run.config.chain.tune == "full":  # no links: the weights are the result
            run.work.save_model(run.chain.detach(), run.tokenizer)
        run.work.end(result, run.progress, _best_point(run))
        if run.work.writes and not needs_judgement(run.work.opened()):
            run.work.publish()
    return result


def result_of(config: RunConfig, stage: str) -> TrainResult:
    """Return the result of a stage that has ended, its file checked, and tidy up after it."""
    Work(config.output or "", stage, writes=is_first_launched()).tidy()
    found = begun_stage(Path(config.output or ""), stage)
    assert found is not None
    return cast(TrainResult, found.result())


def publish_trained(config: RunConfig, stage: str) -> None:
    """Publish a stage that a kill left trained, unless it is to be judged."""
    work = Work(config.output or "", stage, writes=is_first_launched())
    if work.writes and not needs_judgement(work.opened()):
        with work.claimed(config):
            work.publish()


def _final_metrics(run: Run) -> dict[str, Any]:
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
    own = run.chain.links[run.first :]  # without those that it began on
    return {
        "format": RESULT_FORMAT,
        "model": config.model,
        "task": config.data.task,
        "metrics": metrics,
        "best": progress.best,
        "stage": run.stage,
        "links": [_described(link, place) for place, link in enumerate(own)],
        "steps": progress.step,
        "tokens": progress.tokens,
        "scored_tokens": progress.scored_tokens,
        "rows": run.batches.mixture.num_rows,
        "rows_digest": run.splits.digest,
        "data": run.splits.report(),
        "base_fingerprint": run.chain.base_fingerprint,
        "wall_s": round(progress.seconds, 2),
        "peak_memory_mb": peak_memory_mb(run.processes.device),
        "trainable_parameters": _num_trained(run, own),
        "versions": versions(),
        "hardware": hardware(run.processes.device),
    }


def _described(link: Link, place: int) -> dict[str, Any]:
    return {
        "link": place,
        "rank": link.rank,
        "scaling": link.config.scaling,
        "num_steps": link.num_steps,
        "error": link.error,
        "config": link.config.model_dump(mode="json"),
    }


def _num_trained(run: Run, links: Sequence[Link]) -> int:
    if run.config.chain.tune == "full":
        return sum(parameter.numel() for parameter in run.chain.model.parameters())
    return max(map(num_trained, links), default=0)


def _best_point(run: Run) -> tuple[int, Link | None] | None:
    """Return the links up to the best point, if the run ends there: whole ones, and a part."""
    best = run.progress.best
    if not run.train.keep_best or best is None:
        return None
    return best["num_links"], run.chain.links[-1] if run.best_link is not None else None
