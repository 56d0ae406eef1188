"""`chainlora schema`: the keys of a config, for editors and for people."""

from __future__ import annotations

import json

import click


@click.command
@click.option("--markdown", is_flag=True, help="Print a list to read instead.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of a config, for editors.

    With it an editor completes and checks the keys: save it as chainlora.schema.json, and write as
    the first line of a config: # yaml-language-server: $schema=chainlora.schema.json
    """
    from chainlora.config.json_schema import config_page, config_schema

    if markdown:
        click.echo(config_page(), nl=False)
    else:
        click.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False))
