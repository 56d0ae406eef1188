"""`chainlora eval`: scores of a run, a model or an export."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from chainlora.cli.common import (
    check_run_or_model,
    chosen_state,
    dtype_option,
    is_run,
    json_option,
    links_option,
    need_run,
    print_json,
    quiet,
    show,
    stages_option,
    to_stderr,
    whole_run,
)

if TYPE_CHECKING:
    from chainlora.engine.engine import Speedups


@click.command(name="eval")
@click.argument("run_or_model", metavar="RUN|MODEL|EXPORT", type=click.Path())
@click.option(
    "--task", help="Task name (see `chainlora tasks`) or a task file. Default: the run's own rows."
)
@click.option(
    "--data",
    type=click.Path(),
    help="One file of rows, or the task's folder. Default: the run's own, or from the Hub.",
)
@click.option("--split", show_default="validation", help="Which rows of the task or the run.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows, in file order.")
@links_option
@stages_option
@dtype_option
@click.option(
    "--speedups",
    type=click.Choice(["auto", "off"]),
    default="auto",
    help="off: plain transformers, without packing, faster forwards or threads.",
)
@click.option(
    "--predictions",
    type=click.Path(dir_okay=False),
    help="Write what each row scored to this file, as JSONL.",
)
@click.option(
    "--matrix",
    is_flag=True,
    help="Score the rows that each stage of a run kept, after each stage. What was scored before "
    "is not scored again.",
)
@click.option(
    "--start-rows",
    type=click.Path(),
    help="With --matrix: a file of rows for what RUN began on, its base or an adapter. RUN keeps "
    "them as the column `base`, or `start` of an adapter; --task says how they are read.",
)
@json_option
def evaluate(
    run_or_model: str,
    task: str | None,
    split: str | None,
    links: int | None,
    stages: str | None,
    matrix: bool,
    start_rows: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score a run, a model or an export on a task or on rows.

    A run without --task and --data is scored on the rows of its last stage. An export, a folder or
    a .gguf file that `export` wrote, reads rows as its run does. An adapter is scored on the base
    that its adapter_config.json names; CHAINLORA_MODELS is a folder to look for it in.
    """
    if matrix:
        others: dict[str, Any] = {"split": split, "links": links, "stages": stages} | options
        speedups = others.pop("speedups")
        if start_rows is None:
            others["task"] = task
        if given := [name for name, value in others.items() if value is not None]:
            raise click.UsageError(
                f"--matrix scores the kept rows in all states; leave --{given[0]} out"
            )
        if start_rows is not None:
            _keep_start_rows(run_or_model, start_rows, task)
        _score_matrix(run_or_model, as_json, speedups)
        return
    if start_rows is not None:
        raise click.UsageError("--start-rows is for the matrix of a run; use it with --matrix")
    if split is not None and os.path.isfile(os.path.expanduser(options["data"] or "")):
        raise click.UsageError("--split names rows of a folder, and --data is a file; leave it out")
    from chainlora.data.tasks import load_task

    check_run_or_model(run_or_model, links, stages)
    if task is None and options["data"] is None and not is_run(run_or_model):
        what = "is none" if os.path.exists(run_or_model) else "does not exist"
        raise click.UsageError(
            "Missing option '--task' or '--data': only a run has its own rows, and "
            f"{run_or_model} {what}"
        )
    chosen = load_task(task) if task is not None else None
    quiet()
    from chainlora.cli.screen import evaluation_progress
    from chainlora.evaluation.scoring import evaluate_task

    with evaluation_progress() as progress:
        result = evaluate_task(
            chosen_state(run_or_model, stages),
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


def _keep_start_rows(run: str, file: str, task: str | None) -> None:
    """Let a run keep the rows of a file for what it began on."""
    folder = whole_run(run)
    quiet()
    from chainlora.config.schema import StartData
    from chainlora.evaluation.start_rows import keep_start_rows
    from chainlora.runs.addresses import open_run

    keep_start_rows(folder, StartData(validation=file, task=task))
    column = next(iter(open_run(folder).columns))
    to_stderr(f"{run} keeps these rows: from now on they are the column {column} of its matrix")


def _score_matrix(run: str, as_json: bool, speedups: Speedups) -> None:
    need_run(run)
    quiet()
    from chainlora.cli.screen import scored_matrix, show_matrix
    from chainlora.runs.history import START
    from chainlora.runs.paths import split_address

    found = scored_matrix(run, speedups)
    if as_json:
        print_json(found.as_dict())
        return
    show_matrix(found)
    if START in found.stages and START not in {cell.stage for cell in found.cells}:
        file = f"chainlora eval {split_address(run)[0]} --matrix --start-rows FILE"
        to_stderr(f"chainlora: to see what {START} loses, give rows for it: {file}")
