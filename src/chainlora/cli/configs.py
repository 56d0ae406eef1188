"""The verbs about configs: `chainlora schema` and `tasks`."""

from __future__ import annotations

import json

import click

from chainlora.cli.common import complete_tasks, json_option, show


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


@click.command
@click.argument("name", required=False, shell_complete=complete_tasks)
@json_option
def tasks(name: str | None, as_json: bool) -> None:
    """List the tasks, or show one: prompt, labels, source.

    NAME is one of the list, or a file of your own.
    """
    from chainlora.config.yaml_text import dump_yaml
    from chainlora.data.tasks import list_tasks, load_task

    if name is not None:
        task = load_task(name)
        tree = task.model_dump(mode="json", exclude_defaults=True)
        show(task.model_dump(mode="json"), dump_yaml(tree).rstrip(), as_json)
        return
    found = [load_task(each) for each in list_tasks()]
    width = max(len(task.name) for task in found)
    lines = [f"{t.name:<{width}}  {t.metric:<9} {t.description}" for t in found]
    keys = ("name", "description", "metric")
    told = {"tasks": [{key: getattr(task, key) for key in keys} for task in found]}
    show(told, "\n".join(lines), as_json)
