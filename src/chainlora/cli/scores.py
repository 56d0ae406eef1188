"""`chainlora eval`: scores of a run, a model or an export."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from chainlora.cli.common import (
    check_run_or_model,
    dtype_option,
    is_run,
    json_option,
    links_option,
    need_run,
    print_json,
    quiet,
    show,
    to_stderr,
    whole_run,
)

if TYPE_CHECKING:
    from chainlora.engine.engine import Speedups


@click.command(name="eval")
@click.argument("run_or_model", metavar="RUN|MODEL|EXPORT", type=click.Path())
@click.option("--task", help="Task file that says how --data is read. Default: the run's own.")
@click.option(
    "--data",
    type=click.Path(),
    help="File, folder or Hub dataset of rows. Default: the run's own.",
)
@click.option("--split", show_default="validation", help="The split of the run, or of a folder.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows, in file order.")
@links_option
@dtype_option
@click.option(
    "--speedups",
    type=click.Choice(["auto", "off"]),
    default="auto",
    help="off: plain transformers, without packing, fast layers or threads.",
)
@click.option(
    "--predictions",
    type=click.Path(dir_okay=False),
    help="Write the scores of each row to this file, as JSONL.",
)
@click.option(
    "--matrix",
    is_flag=True,
    help="Score the kept rows of each stage, after each stage. Existing scores are reused.",
)
@click.option(
    "--start-rows",
    type=click.Path(),
    help="With --matrix: a file of rows that measure the base, kept as the column `base`. --task "
    "defines how to read them.",
)
@json_option
def evaluate(
    run_or_model: str,
    task: str | None,
    split: str | None,
    links: int | None,
    matrix: bool,
    start_rows: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score a run, a model or an export on a task or on rows.

    Without --task and --data a run is scored on the rows of its last stage. An export (a folder or
    .gguf file that `export` wrote) reads rows like its run. An adapter is scored on the base that
    its adapter_config.json names; CHAINLORA_MODELS is a folder in which to look for that base.
    """
    if matrix:
        others = {"split": split, "links": links} | options | {"task": task}
        _evaluate_matrix(run_or_model, start_rows, others, as_json)
        return
    if start_rows is not None:
        raise click.UsageError("--start-rows is for the matrix of a run; use it with --matrix")
    if split is not None and os.path.isfile(os.path.expanduser(options["data"] or "")):
        raise click.UsageError("--split names rows of a folder, but --data is a file; leave it out")
    check_run_or_model(run_or_model, links)
    _check_rows(run_or_model, task, options["data"])
    from chainlora.data.tasks import load_task

    chosen = load_task(task) if task is not None else None
    quiet()
    from chainlora.cli.screen import evaluation_progress
    from chainlora.evaluation.scoring import evaluate_task

    with evaluation_progress() as progress:
        result = evaluate_task(
            run_or_model,
            chosen,
            split=split or "validation",
            num_links=links,
            progress=progress,
            **options,
        )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    parts = (result.get("stage"), result["task"], result["split"])
    name = " ".join(filter(None, parts))
    show(result, f"{name}: {shown} ({result['rows']} rows)", as_json)


def _check_rows(run_or_model: str, task: str | None, data: str | None) -> None:
    """Raise UsageError for a model without rows to score."""
    if task is None and data is None and not is_run(run_or_model):
        reason = "is not a run" if os.path.exists(run_or_model) else "does not exist"
        raise click.UsageError(
            f"Missing option '--task' or '--data': {run_or_model} {reason}, and only a run has its "
            "own rows"
        )


def _evaluate_matrix(
    run: str, start_rows: str | None, options: dict[str, Any], as_json: bool
) -> None:
    """Show the matrix of a run, after adding a column for `start_rows`, if given."""
    speedups: Speedups = options.pop("speedups")
    task = options.pop("task") if start_rows is not None else None
    if given := [name for name, value in options.items() if value is not None]:
        raise click.UsageError(
            f"--matrix scores the kept rows in all states; leave --{given[0]} out"
        )
    if start_rows is not None:
        _keep_start_rows(run, start_rows, task)
    need_run(run)
    quiet()
    from chainlora.cli.screen import scored_matrix, show_matrix

    matrix = scored_matrix(run, speedups)
    if as_json:
        print_json(matrix.as_dict())
        return
    show_matrix(matrix)


def _keep_start_rows(run: str, file: str, task: str | None) -> None:
    """Keep the rows of a file in a run, to measure its origin."""
    folder = whole_run(run)
    quiet()
    from chainlora.config.schema import StartData
    from chainlora.evaluation.start_rows import keep_start_rows
    from chainlora.runs.addresses import open_run

    keep_start_rows(folder, StartData(validation=file, task=task))
    column = next(iter(open_run(folder).columns))
    to_stderr(f"{run} keeps these rows, as the column {column} of its matrix")
