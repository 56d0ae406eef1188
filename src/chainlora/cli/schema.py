"""`chainlora schema`: the JSON Schema of a config, for editors."""

from __future__ import annotations

import json

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def schema() -> None:
    """Print the JSON Schema of a config, for editors.

    With it an editor completes and checks the keys: save it as chainlora.schema.json, and write as
    the first line of a config: # yaml-language-server: $schema=chainlora.schema.json
    """
    from chainlora.config.json_schema import config_schema

    click.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False))
