"""Write a new version of a run's plan, and begin a run.

A version is one replacement of ``history.json``, under the run's lock. A new run is filled in a
scratch folder and then renamed, so it appears complete, with its first version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from chainlora import files
from chainlora.config.reading import make_config
from chainlora.config.schema import RunConfig
from chainlora.config.template_names import refuse_paths
from chainlora.registry import plugin_digest
from chainlora.runs.beginning import copy_tokenizer, fill_fork, fork_of
from chainlora.runs.documents import write_part
from chainlora.runs.entries import START, Base
from chainlora.runs.history import History
from chainlora.runs.history_file import update_history
from chainlora.runs.loading_start import Start
from chainlora.runs.paths import HISTORY, exists_in
from chainlora.runs.recipes import How, Stage
from chainlora.runs.resuming import general_of, source_digests


def stage_of(
    name: str,
    config: RunConfig,
    names: tuple[str, ...] = (),
    how: How | None = None,
    kind: Literal["stage", "import"] = "stage",
) -> Stage:
    """Return a stage of a plan, with digests of its files and plug-ins.

    `names` are the stages that it stands on, and `how` says how they are put together.
    """
    how = how or How()
    weights = {key: value for key, value in how.importance.items() if key in (START, *names)}
    tree = config.model_dump(mode="json", exclude={"output", "start_data"})
    return Stage(
        name=name,
        kind=kind,
        names=names,
        how=how.model_copy(update={"importance": weights}) if names else How(),
        config=tree,
        sources=source_digests(config),
        plugins={plugin: plugin_digest(plugin) for plugin in config.plugins},
    )


def config_of(run: Path, stage: Stage, **keys: Any) -> RunConfig:
    """Return the config of a stage, with other `keys`.

    Raises ConfigError for paths in template names.
    """
    tree = stage.config | {"output": str(run)} | keys
    refuse_paths(tree, run / HISTORY)
    return make_config(tree)


def first_history(config: RunConfig, base: Base, start: Start) -> History:
    """Return the history of a new run with a config; `start` is a state that it is a fork of."""
    if start.state is not None:
        return fork_of(start.state)
    general = general_of(config)
    return History(base=base, hold=config.chain.hold, seed=config.train.seed, general=general)


def write_plan(run: Path, history: History, start: Start) -> None:
    """Write the history of a run with a new version; create a new run on `start`.

    Raises FileError if another process begins the same run.
    """
    if exists_in(run):
        update_history(run, lambda now: history)
        return
    files.remove_killed(run)
    with files.replaced_folder(run, only_empty=True) as scratch:
        if start.state is not None:
            history = fill_fork(scratch, start.state, history)
        elif start.tokenizer is not None:
            tokenizer = copy_tokenizer(start.tokenizer, scratch)
            history = history.model_copy(update={"tokenizer": tokenizer})
        write_part(scratch / HISTORY, history)
