"""The verbs of stages: `chainlora extend` and `chainlora mix`."""

from __future__ import annotations

import click

from chainlora.cli.common import (
    HELP,
    json_option,
    need_run,
    print_json,
    quiet,
    read_strengths,
    words_and_overrides,
)
from chainlora.config.stages import split_address


@click.command(context_settings=HELP | {"ignore_unknown_options": True})
@click.argument(
    "arguments",
    metavar="RUN[@STAGE] [STAGE.yaml] --name NAME [--KEY.SUB VALUE]...",
    nargs=-1,
    type=click.UNPROCESSED,
)
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and train nothing.")
@json_option
def extend(arguments: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train one more stage on top of RUN: new data, fresh links, the same chain.

    What is not said is as in the stage before; say at least the name, the rows, the ranks and how
    long: --name law --data.train law.jsonl --chain.ranks 8 --chain.epochs 1. STAGE.yaml may hold
    the same. With --output FOLDER the stage becomes a fork, which begins on RUN or RUN@STAGE and
    leaves it as it is. The same command again goes on where it was stopped, or does nothing.
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


@click.command(context_settings=HELP)
@click.argument("run", type=click.Path())
@click.argument("strengths", metavar="[STAGE=STRENGTH]...", nargs=-1)
@json_option
def mix(run: str, strengths: tuple[str, ...], as_json: bool) -> None:
    """Switch stages of RUN off and on, or weaken them: style=0 law=0.5.

    Nothing is trained and nothing is lost: 1 gives back what was, to the bit. From then on RUN
    is this mix for every command; RUN@STAGE stays what that stage ended in. Without strengths, they
    are shown.
    """
    need_run(run)
    folder, stage = split_address(run)
    if stage is not None:
        raise click.UsageError(f"RUN must be a whole run, not {run}; leave @{stage} out")
    chosen = read_strengths(strengths, default=None)
    quiet()
    from chainlora.runs.stages import set_stage_strengths, strengths_of

    if chosen:
        set_stage_strengths(folder, chosen)
    found = strengths_of(folder)
    if as_json:
        print_json({"run": run, "strengths": found})
        return
    for name, strength in found.items():
        click.echo(f"{name}={strength:g}")
