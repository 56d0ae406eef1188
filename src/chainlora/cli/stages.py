"""The verbs of stages: `chainlora extend`, `mix` and `prune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chainlora.cli.common import (
    WithKeys,
    json_option,
    keys_argument,
    need_run,
    print_json,
    quiet,
    read_strengths,
    to_stderr,
    whole_run,
    words_and_overrides,
)
from chainlora.errors import ChainLoRAError, ConfigError

if TYPE_CHECKING:
    from chainlora.engine.engine import Speedups
    from chainlora.evaluation.stages import StageMatrix


@click.command(cls=WithKeys)
@keys_argument("RUN[@STAGE] [STAGE.yaml] --name NAME")
@click.option("--resume", is_flag=True, hidden=True, help="Accepted, and not needed.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and train nothing.")
@json_option
def extend(arguments: tuple[str, ...], resume: bool, dry_run: bool, as_json: bool) -> None:
    """Train one more stage on top of RUN: new data, fresh links, the same chain.

    Options that you leave out are as in the stage before. Give at least the name, the rows, the
    ranks and the length: --name law --data.train law.jsonl --chain.ranks 8 --chain.epochs 1.
    STAGE.yaml may hold the same. With --output FOLDER the stage becomes a fork, which begins on RUN
    or RUN@STAGE and leaves it as it is. The same command again resumes a stage that was stopped or
    killed, or does nothing.
    """
    from chainlora.config.loading import read_tree

    words, overrides = words_and_overrides(list(arguments))
    if not words or words[2:]:
        got = f"unexpected {words[2]!r}" if words[2:] else "Missing argument 'RUN'"
        raise click.UsageError(f"{got}; it is chainlora extend RUN [STAGE.yaml] --name NAME …")
    need_run(words[0])
    section = read_tree(words[1]) if words[1:] else {}
    quiet()
    from chainlora.cli.train import train_and_show
    from chainlora.training.stages import extension

    train_and_show(extension(words[0], section, overrides), overrides, dry_run, as_json)


@click.command
@click.argument("run", type=click.Path())
@click.argument("strengths", metavar="[STAGE=STRENGTH]...", nargs=-1)
@click.option("--best", is_flag=True, help="Search the strengths of the best average.")
@click.option("--no-scores", is_flag=True, help="Do not score the mix on the rows of each stage.")
@json_option
def mix(run: str, strengths: tuple[str, ...], best: bool, no_scores: bool, as_json: bool) -> None:
    """Switch stages of RUN off and on, or weaken them: style=0 law=0.5.

    Nothing is trained and nothing is lost: 1 gives back what was, to the bit. From then on RUN
    is this mix for every command; RUN@STAGE stays what that stage ended in. Without strengths, they
    are shown. What the mix does to the rows of each stage is scored on those that the run kept.
    """
    folder = whole_run(run)
    if best and strengths:
        raise click.UsageError("--best searches the strengths; leave them out")
    chosen = read_strengths(strengths, default=None)
    quiet()
    from chainlora.runs.stages import mix_stages, open_run, strengths_of

    if best:
        from chainlora.cli.progress import evaluation_progress
        from chainlora.evaluation.strengths import best_mix

        mix_stages(folder, {})  # refuses what would refuse the mix that is found
        _say_what_is_averaged(folder)
        with evaluation_progress() as progress:
            chosen, after, before = best_mix(folder, progress=progress)
        to_stderr(f"mean of the row {before:.4f} before, {after:.4f} with the best strengths")
    if chosen:
        mix_stages(folder, chosen)
    found = strengths_of(folder)
    can_score = bool(chosen and open_run(folder).manifest().kept)
    if can_score and not no_scores:  # said first: a kill while it scores undoes no mix
        to_stderr(f"{run} is this mix now; next, what it scores")
    matrix = None
    try:
        if not no_scores:
            matrix = scored_matrix(run, compute=can_score)
    except ChainLoRAError as error:  # the run is this mix, whatever its scores are
        to_stderr(f"chainlora: the mix was not scored: {error}")
    if as_json:
        print_json({"run": run, "strengths": found, "matrix": matrix and matrix.as_dict()})
        return
    if matrix is not None:
        show_matrix(matrix)
    for name, strength in found.items():
        click.echo(f"{name}={strength:g}")


def _say_what_is_averaged(run: Path) -> None:
    """Name the columns that the best mix is searched by, and those before the run without rows."""
    from chainlora.runs.manifest import START
    from chainlora.runs.reading import RunReader
    from chainlora.runs.stages import open_run

    first, manifest = RunReader(run).manifest(), open_run(run).manifest()
    rows = ", ".join(name for name in manifest.columns if name in manifest.kept)
    to_stderr(f"the average is over the rows of {rows or 'no stage'}")
    before = first.until(first.start_links).stages or [START]
    if without := [name for name in before if name not in manifest.kept]:
        to_stderr(
            f"chainlora: what {run} began on has no rows ({', '.join(without)}), so the best mix "
            f"may lose it; give some: chainlora eval {run} --matrix --start-rows FILE"
        )


def scored_matrix(run: str, speedups: Speedups = "auto", *, compute: bool = True) -> StageMatrix:
    """Return the matrix of a run; cells that are missing are scored, with a bar on a terminal."""
    from chainlora.cli.progress import evaluation_progress
    from chainlora.evaluation.stages import stage_matrix

    with evaluation_progress() as progress:
        return stage_matrix(run, speedups=speedups, progress=progress, compute=compute)


def show_matrix(matrix: StageMatrix, echo: Callable[[str], object] = click.echo) -> None:
    """Print a row a state and a column a stage; nothing where no cell was scored."""
    if matrix.cells:
        echo(str(matrix))


@click.command
@click.argument("run", type=click.Path())
@click.argument("stage")
@click.option("--yes", is_flag=True, help="Delete it. Without, say what would be deleted.")
@json_option
def prune(run: str, stage: str, yes: bool, as_json: bool) -> None:
    """Delete STAGE of RUN for good: links, kept rows, reference, records, result, pictures.

    The copies that later stages have of them are deleted too: they were tuned on top of these
    links, and go on without them. Its config stays, and its name is never used again. Without --yes
    nothing is deleted, and the exit status is 1. To switch a stage off, and on again, take mix.
    """
    folder = whole_run(run)
    quiet()
    from chainlora.models.hashing import cache_dir
    from chainlora.runs.pruning import plan_pruning, prune_stage

    found = (prune_stage if yes else plan_pruning)(folder, stage)
    gone, begin = [str(path) for path in found.gone], f"{run}@{found.before}"
    fork = f"chainlora extend {begin} {{0}}.yaml --name {{0}} --output FOLDER"
    again = [fork.format(name) for name in found.later if found.before is not None]
    if as_json:
        print_json({"run": run, "stage": stage, "deleted": yes, "files": gone, "again": again})
    else:
        for path in gone or ["nothing: it was pruned before"]:
            click.echo(f"{'deleted' if yes else 'would delete'} {path}")
        if found.later:
            whole = " chainlora train CONFIG --output FOLDER, without that stage in CONFIG"
            how = "".join(f"\n  {line}" for line in again) or whole
            click.echo(f"stays: {', '.join(found.later)}, tuned on top of it; without it:{how}")
        click.echo("stays: its data files, forks (prune them too), exports, predictions, reports")
        click.echo(f"stays: the cache of tokenised rows of all runs, {cache_dir() / 'rows'}")
    if not yes:
        raise ConfigError("`prune` deletes for good only when told so", "no --yes", "add --yes")
