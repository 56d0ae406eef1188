"""`chainlora tasks`: which tasks there are, and what each is made of."""

from __future__ import annotations

import click

from chainlora.cli.common import complete_presets, json_option, print_json


@click.command
@click.argument("name", required=False, shell_complete=complete_presets("data/tasks"))
@json_option
def tasks(name: str | None, as_json: bool) -> None:
    """List the tasks, or show one: prompt, labels, source.

    NAME is one of the list, or a file of your own.
    """
    from chainlora.config.yaml_text import dump_yaml
    from chainlora.data.tasks import list_tasks, load_task

    if name is not None:
        task = load_task(name)
        if as_json:
            print_json(task.model_dump(mode="json"))
        else:
            tree = task.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            click.echo(dump_yaml(tree).rstrip())
        return
    found = [load_task(each) for each in list_tasks()]
    if as_json:
        keys = ("name", "description", "metric")
        print_json({"tasks": [{key: getattr(t, key) for key in keys} for t in found]})
    else:
        width = max(len(t.name) for t in found)
        for t in found:
            click.echo(f"{t.name:<{width}}  {t.metric:<9} {t.description}")
