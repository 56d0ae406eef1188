"""`chainlora convert-config`: a config of another tool as one of ours."""

from __future__ import annotations

from pathlib import Path

import click

from chainlora.cli.common import to_stderr
from chainlora.errors import ConfigError


@click.command(name="convert-config")
@click.argument("file", required=False, type=click.Path())
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    help="How many devices it was trained on: most tools count the rows of a batch by device.",
)
@click.option("--keys", is_flag=True, help="Print the table of known keys instead.")
def convert_config(file: str | None, processes: int, keys: bool) -> None:
    """Rewrite a config of another tool as one of ours.

    FILE is a config of Axolotl, LLaMA-Factory, TRL, Trainer with PEFT, torchtune or litgpt, in YAML
    or JSON. The result goes to stdout; what became of each key is in its comments and on stderr. A
    config that would train something else here, such as one for KTO, is refused.
    """
    from chainlora.config.foreign import convert, keys_table
    from chainlora.config.loading import make_config, read_tree

    if keys:
        click.echo(keys_table(), nl=False)
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    done = convert(read_tree(file), processes)
    try:
        make_config(done.tree)
    except ConfigError as error:
        done.left.insert(0, f"still to do: {error}")
    click.echo(done.text(Path(file).name), nl=False)
    for line in done.notes:
        to_stderr(line)
