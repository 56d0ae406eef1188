"""`chainlora convert-config`: a config of another tool as one of ours."""

from __future__ import annotations

from pathlib import Path

import click

from chainlora.errors import ConfigError


@click.command(name="convert-config", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path())
@click.option("--keys", is_flag=True, help="Print the table of known keys instead.")
def convert_config(file: str | None, keys: bool) -> None:
    """Rewrite a config of another tool as one of ours.

    FILE is a config of Axolotl, LLaMA-Factory, TRL, Trainer or PEFT, in flat YAML or JSON. What is
    printed is YAML, with a comment for each key that has no equivalent.
    """
    from chainlora.config.foreign import converted_text, foreign_keys, keys_page
    from chainlora.config.loading import make_config, parse_yaml, read_tree

    if keys:
        click.echo(keys_page(), nl=False)
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    tree = read_tree(file)
    if not set(tree) & set(foreign_keys()):
        raise ConfigError(
            f"a config to convert must have keys of another tool (got none in {file}); "
            "`--keys` lists them"
        )
    text = converted_text(tree, Path(file).name)
    click.echo(text, nl=False)
    try:
        make_config(parse_yaml(text) or {})
    except ConfigError as error:
        click.echo(f"# Still to do: {error}")
