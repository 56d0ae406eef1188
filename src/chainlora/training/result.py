"""The end of a run: final metrics, what it cost, and the files that say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.data.rows import Rows
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.runs.costs import hardware, num_trained, peak_memory_mb, versions
from chainlora.runs.manifest import Best, describe_link
from chainlora.runs.reading import RunReader
from chainlora.runs.resuming import compare
from chainlora.runs.stages import STAGES, open_run
from chainlora.training.events import Scored
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


def finished_result(config: RunConfig) -> TrainResult | None:
    """Return the result of a run that is finished, its files checked; None where it is not.

    Raises RunError for another config, other rows or another base than the run's.
    """
    if config.output is None or not (reader := RunReader(config.output)).exists:
        return None
    manifest = reader.manifest()
    if manifest.is_pruned and (reader / STAGES).is_file():  # later stages are what is left
        compare(reader, manifest, config)
        return cast(TrainResult, open_run(reader.path).result())
    if not reader.is_finished(manifest):
        return None
    compare(reader, reader.verify(), config)
    return cast(TrainResult, reader.result())


def finish(run: Run) -> TrainResult:
    """Score the result, write the manifest and ``result.json``, and return what that holds."""
    metrics = _final_metrics(run)
    run.count_seconds()
    result = _result(run, metrics)
    run.engine.close()  # the model's own forwards, before it is saved
    if run.directory is not None:
        if run.config.chain.tune == "full":  # no links: the weights are the result
            run.directory.save_model(run.chain.detach(), run.tokenizer)
        _write_selection(run)
        run.directory.save_result(result)
    return result


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
    own = run.chain.links[run.knots.first :]  # without those that it began on
    return {
        "format": RESULT_FORMAT,
        "model": config.model,
        "task": config.data.task,
        "metrics": metrics,
        "best": progress.best,
        "stage": run.stage,
        "links": [describe_link(link, stage=run.stage) for link in own],
        "steps": progress.step,
        "tokens": progress.tokens,
        "scored_tokens": progress.scored_tokens,
        "rows": run.plan.mixture.num_rows,
        "rows_digest": run.splits.digest,
        "data": run.splits.report(),
        "base_fingerprint": run.chain.base_fingerprint,
        "wall_s": round(progress.seconds, 2),
        "peak_memory_mb": peak_memory_mb(run.processes.device),
        "trainable_parameters": _num_trained(run, own),
        "versions": versions(),
        "hardware": hardware(run.processes.device),
    }


def _num_trained(run: Run, links: Sequence[Link]) -> int:
    if run.config.chain.tune == "full":
        return sum(parameter.numel() for parameter in run.chain.model.parameters())
    return max(map(num_trained, links), default=0)


def _write_selection(run: Run) -> None:
    """Write the manifest; with `keep_best`, it names the best point and keeps all links."""
    directory, best = run.directory, run.progress.best
    assert directory is not None
    if not run.train.keep_best or best is None:
        run.write_manifest()
        return
    partial = run.chain.links[-1] if run.best_link is not None else None
    directory.select(best["num_links"], best["step"], partial, run.progress)
