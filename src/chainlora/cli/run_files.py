"""The commands that delete or copy files of a run: `prune`, `push` and `pull`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from chainlora.cli.common import json_option, print_json, quiet, show, to_stderr, whole_run
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from chainlora.runs.pruning import Pruning


@click.command
@click.argument("run", type=click.Path())
@click.argument("stage")
@click.option("--yes", is_flag=True, help="Delete. Without it, only show what would be deleted.")
@json_option
def prune(run: str, stage: str, yes: bool, as_json: bool) -> None:
    """Delete STAGE of RUN for good: links, kept rows, config, records, result, scores.

    Also deleted: stages that were trained on top of STAGE, combinations that were computed from it,
    and RUN's pictures and report. The other stages are combined again, as they were before.

    STAGE may also be a combination, if neither the current state nor a stage was computed from it.
    `undo` then skips it; `combine` with the names of its parts computes it again.

    The command lists what it does not delete: data files, forks, exports, copies, and tokenised
    rows of large files, which are in a cache outside RUN.

    Without --yes nothing is deleted and the exit status is 1. `undo` goes back to the state before
    STAGE and deletes nothing.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.runs.addresses import open_run
    from chainlora.runs.pruning import plan_pruning

    if not yes:
        pruning = plan_pruning(folder, stage)
    else:
        from chainlora.training.progress import progress_listener
        from chainlora.training.stages import prune as prune_from

        with progress_listener() as listener:
            pruning = prune_from(folder, stage, listener=listener)
    _show_pruning(run, stage, pruning, yes, as_json)
    if not yes:
        raise ConfigError("Nothing deleted. Add --yes.")
    if pruning.again or pruning.later:
        now = open_run(folder)
        to_stderr(f"{run} is {now.key} now, of {', '.join(now.history.parts(now.key))}")


def _show_pruning(run: str, stage: str, pruning: Pruning, yes: bool, as_json: bool) -> None:
    """Print what a pruning deletes, what stays, and how to train later stages again."""
    gone = [str(path) for path in pruning.gone]
    place = shlex.quote(run)
    again = [f"chainlora extend {place} ROWS --on-top --name {name}" for name in pruning.later]
    stays = _remains(pruning)
    if as_json:
        shown = {"run": run, "stage": stage, "deleted": yes, "files": gone}
        shown |= {"computed": pruning.with_it, "again": again, "stays": stays, "now": pruning.now}
        print_json(shown)
        return
    others = [*pruning.later, *pruning.with_it]
    for deleted in [*gone, *(f"{name}, computed from it" for name in others)]:
        click.echo(f"{'deleted' if yes else 'would delete'} {deleted}")
    for kept in stays:
        click.echo(f"stays: {kept}")
    if again:
        click.echo("\n  ".join(["to train these again, without it:", *again]))
    if pruning.now is not None:
        click.echo(f"{run} {'is' if yes else 'would be'} {pruning.now} now")
    if pruning.again and not yes:
        click.echo(f"would combine the others again: {', '.join(pruning.left)}")


def _remains(pruning: Pruning) -> list[str]:
    """Return lines about traces of a stage that a pruning does not delete."""
    from chainlora.data.preparing import IN_MEMORY
    from chainlora.models.identity import cache_dir

    return [
        "forks (prune them too), pushed copies, exports, predictions, reports in other places, "
        "records of trackers in other places, and the data files or the adapter of a stage",
        f"tokenised rows of files of more than {IN_MEMORY:,} rows, of all runs: "
        f"{cache_dir() / 'rows'}",
    ]


@click.command
@click.argument("run", type=click.Path())
@click.argument("target", metavar="FOLDER|OWNER/NAME")
@click.option("--rows", is_flag=True, help="Also copy the rows that stages kept.")
@json_option
def push(run: str, target: str, rows: bool, as_json: bool) -> None:
    """Copy RUN to a folder or to a repository of the Hub. A new repository is private.

    The command copies the history, and the files of the history that the target lacks: links,
    configs, records, results. Kept rows are copied only with --rows. Configs contain the paths of
    your files as you wrote them.
    """
    whole_run(run)
    quiet()
    from chainlora.runs.hub import push_run

    _show_sent(push_run(run, target, rows=rows), run, target, as_json)


@click.command
@click.argument("source", metavar="FOLDER|OWNER/NAME")
@click.argument("run", type=click.Path())
@json_option
def pull(source: str, run: str, as_json: bool) -> None:
    """Copy a pushed run into RUN: a new folder, or an earlier state of the same run."""
    quiet()
    from chainlora.runs.hub import pull_run

    _show_sent(pull_run(source, run), source, run, as_json)


def _show_sent(names: Sequence[str], source: str, target: str, as_json: bool) -> None:
    text = "\n".join([*names, f"{len(names)} files, and history.json: {source} -> {target}"])
    show({"from": source, "to": target, "files": names}, text, as_json)
